"""What load generators do, with Python alone: prompts, streams that are timed, and a result.

vLLM's and SGLang's differ in their options and in what their results hold besides. This file is in
the images of both stand-ins.
"""

import http.client
import json
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

WORDS = 10_000  # a token each, for the models of both stand-ins


@dataclass
class Output:
    """What one request found."""

    prompt_len: int
    output_len: int = 0
    ttft: float = 0.0
    itl: list = field(default_factory=list)
    text: str = ""
    error: str = ""


def require_tokenizer(place: str) -> None:
    """Refuse a directory without a tokenizer, in transformers' words.

    Raises:
        OSError: it has none.
    """
    if not (Path(place) / "tokenizer_config.json").is_file():
        raise OSError(
            f"Can't load tokenizer for '{place}'. If you were trying to load it from "
            "'https://huggingface.co/models', make sure you don't have a local directory with the "
            f"same name. Otherwise, make sure '{place}' is the correct path to a directory "
            "containing all relevant files."
        )


def prompts(count: int, length: int, seed: int) -> list:
    """Make prompts of so many tokens, others with each seed."""
    source = random.Random(seed)
    return [
        " ".join(f"w{(first + number) % WORDS}" for number in range(length))
        for first in (source.randrange(WORDS) for _ in range(count))
    ]


def ask(url: str, body: dict, length: int) -> Output:
    """Send one request and time its stream."""
    output, place = Output(length), urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(place.hostname, place.port)
    began = last = time.perf_counter()
    try:
        connection.request("POST", place.path, json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            output.error = answer.reason or ""
            return output
        tokens = None
        for line in answer:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if choices := event.get("choices"):
                now = time.perf_counter()
                if output.ttft:
                    output.itl.append(now - last)
                else:
                    output.ttft = now - began
                last = now
                output.text += choices[0].get("text") or ""
            elif usage := event.get("usage"):
                tokens = usage.get("completion_tokens")
        if not output.ttft:
            output.error = "Never received a valid chunk to calculate TTFT."
            return output
        output.output_len = tokens or body["max_tokens"]
    except (OSError, http.client.HTTPException, ValueError) as error:
        output.error = f"Traceback (most recent call last):\n{type(error).__name__}: {error}"
    finally:
        connection.close()
    return output


def carried(url: str, bodies: list, length: int, at_once: int) -> tuple:
    """Send all requests, so many at a time; return what each found, and the seconds it took."""
    outputs: list = [None] * len(bodies)
    numbers, lock = iter(range(len(bodies))), threading.Lock()

    def slot() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            outputs[number] = ask(url, bodies[number], length)

    began = time.perf_counter()
    slots = [threading.Thread(target=slot) for _ in range(min(at_once, len(bodies)))]
    for thread in slots:
        thread.start()
    for thread in slots:
        thread.join()
    return outputs, time.perf_counter() - began


def summed_up(outputs: list, seconds: float) -> dict:
    """Return what both generators write of a load and of each of its requests."""
    answered = [output for output in outputs if not output.error]
    tokens = sum(output.output_len for output in answered)
    ttfts = [1000 * output.ttft for output in answered]
    tpots = [
        1000 * sum(output.itl) / (output.output_len - 1)
        for output in answered
        if output.output_len > 1
    ]
    return {
        "duration": seconds,
        "completed": len(answered),
        "total_input_tokens": sum(output.prompt_len for output in answered),
        "total_output_tokens": tokens,
        "request_throughput": len(answered) / seconds,
        "output_throughput": tokens / seconds,
        "median_ttft_ms": median(ttfts),
        "median_tpot_ms": median(tpots),
        "input_lens": [output.prompt_len for output in outputs],
        "output_lens": [output.output_len for output in outputs],
        "ttfts": [output.ttft for output in outputs],
        "itls": [output.itl for output in outputs],
        "generated_texts": [output.text for output in outputs],
        "errors": [output.error for output in outputs],
    }


def median(values: list) -> float:
    """Return the middle value; 0 of none, as the originals do."""
    ordered = sorted(values) or [0.0]
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
