"""The load generator of an image in memory: what is asked of it, and what it finds of a proxy."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from pd_deploy.engines import load_generator
from pd_deploy.engines.load_generator import KEY_VARIABLE
from pd_deploy.engines.load_in_container import MARK
from tests.memory.machine import Container, Machine
from tests.memory.programs import TokenByToken

AT_ONCE_S = 0.001
"""What a token takes that comes with all others."""


def is_asked(argv: Sequence[str]) -> bool:
    """Whether a command runs a load generator."""
    return load_generator._SOURCE in argv


def carried(
    machine: Machine, container: Container, argv: Sequence[str], environment: Mapping[str, str]
) -> tuple[str, float]:
    """What the command prints, and after how many seconds."""
    told = json.loads(argv[-1])
    version = container.image.build.load_generator
    if not version:
        lacks = f"package {told['package']} 0.8.0 has no {told['sources'][0]}"
        return MARK + json.dumps({"missing": lacks}), 0
    if "arguments" not in told:
        return MARK + json.dumps({"version": version}), 0
    words = told["arguments"]
    given = {
        word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word[:2] == "--"
    }
    tokenizer = f"{given['--tokenizer']}/config.json"
    if not machine.disk.read(tokenizer):
        said = f"OSError: Can't load tokenizer for '{given['--tokenizer']}'."
        return MARK + json.dumps({"version": version, "code": 1, "said": said}), 0
    requests, at_once = int(given["--num-prompts"]), int(given["--max-concurrency"])
    found = [_request(machine, given, environment, number) for number in range(requests)]
    tokens = int(given["--random-output-len"])
    slowest = max(ttft + sum(itl) for ttft, itl, _ in found)
    seconds = math.ceil(requests / at_once) * max(slowest, tokens * AT_ONCE_S)
    if seconds > told["seconds"]:
        return MARK + json.dumps({"version": version, "late": True}), told["seconds"]
    result = {
        "duration": seconds,
        "ttfts": [ttft for ttft, _, _ in found],
        "itls": [itl for _, itl, _ in found],
        "output_lens": [0 if error else tokens for _, _, error in found],
        "errors": [error for _, _, error in found],
    }
    return MARK + json.dumps({"version": version, "result": result}), seconds


def _request(
    machine: Machine, given: Mapping[str, str], environment: Mapping[str, str], number: int
) -> tuple[float, list[float], str]:
    """The time to the first token, those after it, and what went wrong."""
    place = urlsplit(given["--base-url"])
    assert place.hostname
    assert place.port
    program = machine.cluster.listener(machine, place.hostname, place.port)
    assert program, "the smoke test has passed"
    if program.api_key and environment.get(KEY_VARIABLE) != program.api_key:
        return 0, [], "Unauthorized"
    tokens = int(given["--random-output-len"])
    body = {
        "model": given["--model"],
        "prompt": [number] * int(given["--random-input-len"]),
        "max_tokens": tokens,
        "stream": True,
    }
    try:
        answer = program.answer("/v1/completions", body)
    except httpx.HTTPError as error:
        return 0, [], f"{type(error).__name__}: {error}"
    if answer.status_code != 200:
        return 0, [], answer.reason_phrase
    if isinstance(answer.stream, TokenByToken):
        each = answer.stream.seconds
        return each, [each * (tokens - 1)], ""
    assert [*_events(answer.text)], "the smoke test has passed"
    return AT_ONCE_S, [AT_ONCE_S * (tokens - 1)], ""


def _events(text: str) -> Iterator[Any]:
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
