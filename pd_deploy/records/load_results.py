"""Samples and figures out of what load generators wrote: vLLM's, and SGLang's, which has the same
form. Pure."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ValidationError

from pd_deploy.config.models import Benchmark
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.records.benchmark import Figures, Load, Sample, summed_up

NAME = "vllm bench"
CLOSE = 0.05
"""By which share the mean length of prompts or answers may differ: texts have no exact length."""


class _Requests(BaseModel):
    """Of a detailed result what is needed, by request: the seconds to its first token and between
    two tokens, how many there were, and what went wrong."""

    duration: float
    ttfts: list[float]
    itls: list[list[float]]
    output_lens: list[int]
    errors: list[str]


class _Result(BaseModel):
    """Of the result what is needed; times are in ms. Percentiles are those that were asked for."""

    num_prompts: int
    max_concurrency: int | None = None
    completed: int
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    output_throughput: float
    median_ttft_ms: float
    median_tpot_ms: float
    p95_ttft_ms: float | None = None
    p95_tpot_ms: float | None = None


def samples(result: Mapping[str, Any]) -> tuple[list[Sample], float]:
    """Read each request of a detailed result, and how many seconds all of them took.

    Raises:
        ValueError: it is no such result.
    """
    try:
        of = _Requests.model_validate(result)
        each = zip(of.ttfts, of.itls, of.output_lens, of.errors, strict=True)
        return [_sample(*request) for request in each], of.duration
    except ValueError as error:
        raise ValueError(str(error).partition("\n")[0]) from None


def _sample(ttft: float, between: list[float], tokens: int, error: str) -> Sample:
    # A failed request may have had its first token, or fail without a word.
    if error or not ttft:
        lines = error.strip().splitlines()
        return Sample(0, fault=lines[-1] if lines else "no answer")
    # A time may be of several tokens, where an engine guesses ahead.
    return Sample(tokens, ttft, sum(between) / (tokens - 1) if tokens > 1 and between else None)


def figures(text: str, given: Benchmark, *, generation: str, when: datetime, by: str) -> Figures:
    """Read the figures of a result; they have to be of the load that the file asks for.

    Raises:
        InvalidInput: it is no such result, or of another load, with the option that is to differ.
    """
    try:
        content = json.loads(text)
        result = _Result.model_validate(content)
        requests = samples(content) if "ttfts" in content else None
    except (ValueError, ValidationError) as error:
        why = str(error).partition("\n")[0]
        message = f"expected what `vllm bench serve --save-result` writes, found otherwise: {why}"
        raise InvalidInput([Problem("--result", message)]) from None
    if problems := [*_of_another_load(result, given, detailed=requests is not None)]:
        raise InvalidInput(problems)
    load = Load.of(given, NAME)
    if requests:
        each, seconds = requests
        return summed_up(each, load, generation=generation, when=when, by=by, seconds=seconds)
    return Figures(
        generation=generation,
        when=when,
        by=by,
        load=load,
        answered=result.completed,
        failed=result.num_prompts - result.completed,
        seconds=result.duration,
        ttft=result.median_ttft_ms / 1000,
        ttft_p95=_seconds(result.p95_ttft_ms),
        tpot=result.median_tpot_ms / 1000,
        tpot_p95=_seconds(result.p95_tpot_ms),
        throughput=result.output_throughput,
    )


def _of_another_load(result: _Result, given: Benchmark, *, detailed: bool) -> Iterator[Problem]:
    each = max(result.completed, 1)
    for option, key, share, found in (
        ("--num-prompts", "requests", 0.0, result.num_prompts),
        ("--max-concurrency", "concurrency", 0.0, result.max_concurrency or result.num_prompts),
        ("--random-input-len", "input_length", CLOSE, round(result.total_input_tokens / each)),
        ("--random-output-len", "output_length", CLOSE, round(result.total_output_tokens / each)),
    ):
        expected: int = getattr(given, key)
        if abs(found - expected) > share * expected:
            message = f"expected {expected}, as gates.benchmark.{key} says, found {found}"
            yield Problem(f"--result, {option}", message)
    limits = given.limits
    if detailed:
        return
    if (limits.ttft and result.p95_ttft_ms is None) or (limits.tpot and result.p95_tpot_ms is None):
        message = "expected 95 among them, as gates.benchmark.limits are for 95 % of the requests"
        yield Problem("--result, --metric-percentiles", f"{message}; found no such figures")


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
