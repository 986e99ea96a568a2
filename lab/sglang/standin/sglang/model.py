"""What the model says: prompts of numbers are continued, others get words that follow from them."""

import hashlib
import re

WORDS = ("sun", "moon", "tree", "river", "stone", "bird", "cloud", "fire")
KV_BYTES = 1024
"""Per token of a prompt."""


def prompt_of(body: dict) -> str:
    """Return the prompt of a completion or a chat; token ids as text."""
    if "messages" in body:
        return str(body["messages"][-1]["content"])
    prompt = body["prompt"]
    return " ".join(map(str, prompt)) if isinstance(prompt, list) else str(prompt)


def tokens_of(prompt: str) -> int:
    """Return how long a prompt is."""
    return max(1, len(prompt.split()))


def answer(kv: str, count: int) -> str:
    """Return `count` tokens or less, by the prompt that the KV is of."""
    numbers = [int(found) for found in re.findall(r"\d+", kv)] if kv.endswith(",") else []
    if len(numbers) > 2:
        step = numbers[-1] - numbers[-2]
        return ",".join(f" {numbers[-1] + step * (i + 1)}" for i in range(max(count // 2, 1)))
    digest = hashlib.sha256(kv.encode()).digest()
    return "".join(f" {WORDS[digest[i % 32] % len(WORDS)]}" for i in range(count))
