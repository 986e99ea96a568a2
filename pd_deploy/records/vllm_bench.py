"""Figures out of what `vllm bench serve --save-result` wrote. Pure."""

import json
from collections.abc import Iterator
from datetime import datetime

from pydantic import BaseModel, ValidationError

from pd_deploy.config.models import Benchmark
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.records.benchmark import Figures, Load

NAME = "vllm bench"
CLOSE = 0.05
"""By which share the mean length of prompts or answers may differ: texts have no exact length."""


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


def figures(text: str, given: Benchmark, *, generation: str, when: datetime, by: str) -> Figures:
    """Read the figures of a result; they have to be of the load that the file asks for.

    Raises:
        InvalidInput: it is no such result, or of another load, with the option that is to differ.
    """
    try:
        result = _Result.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        why = str(error).partition("\n")[0]
        message = f"expected what `vllm bench serve --save-result` writes, found otherwise: {why}"
        raise InvalidInput([Problem("--result", message)]) from None
    if problems := [*_of_another_load(result, given)]:
        raise InvalidInput(problems)
    load = Load.of(given).model_copy(update={"generator": NAME})
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


def _of_another_load(result: _Result, given: Benchmark) -> Iterator[Problem]:
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
    if (limits.ttft and result.p95_ttft_ms is None) or (limits.tpot and result.p95_tpot_ms is None):
        message = "expected 95 among them, as gates.benchmark.limits are for 95 % of the requests"
        yield Problem("--result, --metric-percentiles", f"{message}; found no such figures")


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
