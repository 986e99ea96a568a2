"""What the smoke test asks. Pure."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd_deploy.config.models import Deployment, SmokeCheck
from pd_deploy.config.topology import Proxy

HANDOVER_TOKENS = 8
"""Tokens that a prefill and a decode are asked for directly. Prefill makes the first one; from the
second on they follow from the KV that decode used."""
COMPARED = ("The capital of France is", "Once upon a time, there was")
"""Prompts that are asked beside `smoke.prompt` where no check says what the right answer is."""
_LOWEST_ID, _IDS = 100, 128
"""Token ids that every vocabulary has, and that are special tokens in none of today's models."""

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Question:
    """One request: its path and body, and its name in messages."""

    path: str
    body: Mapping[str, Any]
    name: str


def completion(deployment: Deployment, proxy: Proxy) -> tuple[str, dict[str, Any]]:
    """URL and body of the completion that a client would ask for (contract section 6)."""
    url = f"http://{proxy.address}:{proxy.port}{COMPLETIONS}"
    return url, prompt(deployment, deployment.smoke.prompt, deployment.smoke.max_tokens)


def prompt(deployment: Deployment, text: str, max_tokens: int) -> dict[str, Any]:
    """Build the body of a completion request, always the same for the same text."""
    return {
        "model": deployment.model.served_name,
        "prompt": text,
        "max_tokens": max_tokens,
        "temperature": 0,
    }


def of_check(deployment: Deployment, check: SmokeCheck, longest: int, seed: str) -> Question:
    """Build the request that a check sends.

    Args:
        longest: tokens of the longest prompt that the service can serve, answer included.
        seed: makes a long prompt another one each time, so that no cache has it.
    """
    body: dict[str, Any] = {
        "model": deployment.model.served_name,
        "max_tokens": check.max_tokens,
        "temperature": 0,
    }
    if check.stream:
        body["stream"] = True
    if check.chat is not None:
        return Question(
            CHAT, {**body, "messages": [{"role": "user", "content": check.chat}]}, check.name
        )
    if check.prompt_tokens is None:
        return Question(COMPLETIONS, {**body, "prompt": check.prompt}, check.name)
    room = max(longest - check.max_tokens, 1)
    count = room if check.prompt_tokens == "limit" else min(check.prompt_tokens, room)
    return Question(
        COMPLETIONS, {**body, "prompt": _ids(count, seed)}, f"a prompt of {count} tokens"
    )


def _ids(count: int, seed: str) -> list[int]:
    """Token ids that differ from one seed to another in their first ones."""
    chosen = random.Random(seed)  # noqa: S311  nothing is kept secret by it
    first = [_LOWEST_ID + chosen.randrange(_IDS) for _ in range(min(count, 16))]
    rest = itertools.islice(
        itertools.cycle(range(_LOWEST_ID, _LOWEST_ID + _IDS)), count - len(first)
    )
    return [*first, *rest]
