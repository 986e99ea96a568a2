"""Figures of a load, the tolerance that is learned from them, and what counts as worse."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pd_deploy.cli import bench
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Benchmark, BenchmarkLimits
from pd_deploy.errors import HostUnreachable, InvalidInput
from pd_deploy.flows.deploy import deploy
from pd_deploy.records import benchmark, vllm_bench
from pd_deploy.records.benchmark import (
    ENOUGH,
    KEPT,
    LEAST,
    MOST,
    UNLEARNED,
    Figures,
    Load,
    Sample,
    judge,
    percentile,
    summed_up,
    tolerance,
)
from pd_deploy.records.releases import Record
from pd_deploy.steps.verify.load import Measured, carried
from tests.memory.machine import Faults
from tests.memory.world import World
from tests.unit import example

LOAD = Load(requests=40, concurrency=4, input_length=64, output_length=16)
GIVEN = Benchmark(requests=40, concurrency=4, input_length=64, output_length=16)
FEW = settings(max_examples=40)
FIGURE = st.floats(1e-4, 1e4)


def figures(generation: str = "2-b", **changes: Any) -> Figures:
    """Steady ones: TTFT 0.2 s, TPOT 20 ms, 100 tokens/s."""
    usual = {
        "generation": generation, "when": datetime(2026, 1, 1, tzinfo=UTC), "by": "a test",
        "load": LOAD, "answered": 40, "failed": 0, "seconds": 6.4,
        "ttft": 0.2, "ttft_p95": 0.3, "tpot": 0.02, "tpot_p95": 0.03, "throughput": 100.0,
    }  # fmt: skip
    return Figures.model_validate(usual | changes)


@FEW
@given(st.lists(FIGURE, min_size=1))
def test_a_percentile_lies_among_the_values_and_grows(values: list[float]) -> None:
    at = [percentile(values, percent) or 0 for percent in (1, 50, 95, 99)]
    assert at == pytest.approx(sorted(at))
    assert min(values) <= at[0] * (1 + 1e-9)
    assert at[-1] <= max(values) * (1 + 1e-9)
    assert percentile([], 50) is None


@FEW
@given(st.lists(FIGURE), st.floats(0.01, 100))
def test_a_tolerance_is_bounded_and_has_no_unit(values: list[float], unit: float) -> None:
    learned = tolerance(values)
    assert LEAST <= learned <= MOST + 1e-9
    assert tolerance([value * unit for value in values]) == pytest.approx(learned, rel=1e-6)
    assert len(values) > 3 or learned == UNLEARNED


@FEW
@given(FIGURE, st.floats(0, 0.05), st.lists(st.sampled_from((-1, 1)), min_size=8, max_size=20))
def test_figures_that_vary_more_get_more_tolerance_and_are_let_through(
    middle: float, spread: float, signs: list[int]
) -> None:
    values = [middle * (1 + spread * sign) for sign in signs]
    calm = [middle * (1 + spread / 2 * sign) for sign in signs]
    assert tolerance(calm) <= tolerance(values)
    if all(one != other for one, other in pairwise(signs)):
        assert max(values) <= min(values) * (1 + tolerance(values)) * (1 + 1e-9)


@FEW
@given(FIGURE, st.floats(1.5, 10), st.integers(3, 8), st.integers(3, 8))
def test_a_service_that_became_faster_once_does_not_count_as_one_that_varies(
    slow: float, gain: float, before: int, after: int
) -> None:
    assert tolerance([slow] * before + [slow / gain] * after) == LEAST


@FEW
@given(st.floats(0.05, 5), st.floats(0.01, 0.9))
def test_the_same_figures_pass_and_those_beyond_the_tolerance_never_do(
    factor: float, share: float
) -> None:
    given_ = GIVEN.model_copy(update={"tolerance": share})
    kept, good = [figures("1-a")], ["1-a"]
    same = judge(figures(), given_, kept, good)
    assert (same.faults, same.remarks) == ((), ())
    assume(abs(factor / (1 + share) - 1) > 1e-6)
    now = figures(ttft=0.2 * factor, throughput=100 / factor)
    assert len(judge(now, given_, kept, good).faults) == (2 if factor > 1 + share else 0)


def test_a_regression_says_both_figures_and_the_generations() -> None:
    now = figures(tpot=0.05, throughput=40.0)
    judged = judge(now, GIVEN, [figures("0-z", tpot=0.001), figures("1-a")], ["0-z", "1-a"])
    assert judged.faults == (
        "TPOT is 50 ms instead of 20 ms with generation 1-a (at most 24 ms by a tolerance of 20%)",
        "throughput is 40 tokens/s instead of 100 tokens/s with generation 1-a (at least 83 "
        "tokens/s by a tolerance of 20%)",
    )
    assert judged.of_the_generation


@pytest.mark.parametrize(
    ("kept", "good"),
    [
        ([], ["1-a"]),
        ([figures("1-a")], []),
        ([figures("1-a", load=LOAD.model_copy(update={"concurrency": 8}))], ["1-a"]),
        ([figures("1-a", passed=False)], ["1-a"]),
        ([figures("1-a", failed=1)], ["1-a"]),
        ([figures("1-a", answered=ENOUGH - 1)], ["1-a"]),
        ([figures("1-a", busy=0.95)], ["1-a"]),
    ],
    ids=["none", "not good", "another load", "refused", "failures", "too few", "client busy"],
)
def test_without_figures_to_rely_on_a_load_is_only_recorded(
    kept: list[Figures], good: list[str]
) -> None:
    judged = judge(figures(tpot=9.0, throughput=0.1), GIVEN, kept, good)
    assert judged.faults == ()
    assert judged.remarks == (
        "nothing to compare with: no good generation has figures of this load",
    )


def test_limits_are_for_95_percent_and_blame_no_image_that_the_one_before_did_not_keep_either(
) -> None:  # fmt: skip
    given_ = Benchmark.model_validate(
        GIVEN.model_dump(exclude={"limits"}) | {"limits": {"ttft": 0.25, "throughput": 200}}
    )
    first = judge(figures(), given_, [], [])
    assert first.faults == (
        "TTFT for 95 % of the requests is 300 ms (at most 250 ms by gates.benchmark.limits.ttft)",
        "throughput is 100 tokens/s (at least 200 tokens/s by gates.benchmark.limits.throughput)",
    )
    assert not first.of_the_generation
    as_slow = judge(figures(), given_, [figures("1-a")], ["1-a"])
    assert "; generation 1-a had 300 ms" in as_slow.faults[0]
    assert not as_slow.of_the_generation
    better = figures("1-a", ttft_p95=0.24)
    assert judge(figures(), given_, [better], ["1-a"]).of_the_generation


def test_what_the_load_generator_itself_may_have_caused_is_no_regression_but_said() -> None:
    kept, good, slow = [figures("1-a")], ["1-a"], {"ttft": 0.5, "ttft_p95": 0.6}
    assert judge(figures(**slow), GIVEN, kept, good).faults
    assert not judge(figures(**slow, delay=0.3), GIVEN, kept, good).faults
    busy = judge(figures(**slow, busy=0.97), GIVEN, kept, good)
    assert not busy.faults
    assert "not judged: pd-deploy itself used 97% of a core" in busy.remarks[0]
    assert "TTFT is 500 ms instead of 200 ms" in busy.remarks[0]


def test_too_few_answers_are_judged_by_throughput_alone_and_said() -> None:
    now = figures(answered=3, ttft=9.0, ttft_p95=9.0, throughput=1.0, seconds=60)
    judged = judge(now, GIVEN, [figures("1-a")], ["1-a"])
    assert [fault.partition(" ")[0] for fault in judged.faults] == ["throughput"]
    assert judged.remarks == (
        "TTFT and TPOT not judged: only 3 requests were answered in 60 s, and 20 are needed",
    )


def test_a_service_that_answers_nothing_in_time_is_refused_even_without_a_figure_to_compare(
) -> None:  # fmt: skip
    now = figures(answered=0, ttft=None, tpot=None, throughput=2.0, seconds=60)
    assert judge(now, GIVEN, [], []).faults == ("no request was answered in 60 s",)


def test_failed_requests_are_no_samples_and_cut_ones_count_for_throughput_alone() -> None:
    samples = [
        Sample(16, ttft=0.2, tpot=0.01), Sample(0, fault="status 500"), Sample(4, cut=True)
    ]  # fmt: skip
    summed = summed_up(
        samples, LOAD, generation="1-a", when=datetime.now(UTC), by="", seconds=2.0, delays=[0.1]
    )
    assert (summed.answered, summed.failed, summed.throughput) == (1, 1, 10.0)
    assert (summed.ttft, summed.tpot, summed.delay) == (0.2, 0.01, 0.1)
    assert str(summed) == "TTFT 200 ms, TPOT 10 ms, throughput 10 tokens/s"


def test_a_record_keeps_the_last_figures_and_is_small() -> None:
    record = Record()
    for number in range(KEPT + 5):
        record = record.measured(figures(f"{number}-a"))
    assert [f.generation for f in record.figures] == [f"{n}-a" for n in range(5, KEPT + 5)]
    assert record.measured(None) is record
    assert record.measured(record.figures[-1]) is record
    assert len(record.model_dump_json(indent=1)) < 20_000
    drawn = benchmark.as_markdown(record.figures)
    assert sum("█" in line for line in drawn) == KEPT


Answer = Callable[[dict[str, Any]], httpx.Response]


async def load_on(answer: Answer, limit: float = 20, **changes: int) -> tuple[Measured, list[Any]]:
    """What a load on a service that answers so finds, and what was asked."""
    asked: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return answer(asked[-1])

    load = LOAD.model_copy(update=changes)
    async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as client:
        url = "http://127.77.0.1:7000/v1/completions"
        measured = await carried([(client, url)], example.service(), load, {}, limit=limit)
    return measured, asked


def event(**content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


def streamed(body: dict[str, Any], per_event: int = 2) -> str:
    """Tokens in events of several, as an engine sends them that guesses ahead."""
    chunks = event(choices=[{"text": " sun"}]) * (body["max_tokens"] // per_event)
    usage = event(choices=[], usage={"completion_tokens": body["max_tokens"]})
    return f"{chunks}{usage}data: [DONE]\n\n"


async def test_each_request_is_of_the_size_asked_for_and_no_prompt_comes_twice() -> None:
    measured, asked = await load_on(lambda body: httpx.Response(200, text=streamed(body)))
    assert [s.tokens for s in measured.samples] == [16] * 40
    assert all(s.ttft is not None and not s.fault for s in measured.samples)
    assert len(asked) == 40 + 4, "the warm-up does not count"
    assert {(len(b["prompt"]), b["ignore_eos"]) for b in asked} == {(64, True)}
    assert len({tuple(b["prompt"][:16]) for b in asked}) == len(asked)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda _: httpx.Response(503, text="overloaded"), "status 503: 'overloaded'"),
        (lambda _: httpx.Response(200, text=event(error="KV lost")), 'data: {"error": "KV lost"}'),
        (lambda b: httpx.Response(200, text=streamed(b)[:-16]), "ended without [DONE]"),
        (lambda _: httpx.Response(200, text="garbage"), "0 events that ended without [DONE]"),
    ],
)
async def test_a_failed_request_says_why(answer: Answer, fault: str) -> None:
    measured, _ = await load_on(answer, requests=20)
    assert len(measured.samples) == 20
    assert all(fault in s.fault for s in measured.samples)


async def test_a_lost_way_to_the_host_is_no_failed_request() -> None:
    def lost(_: object) -> httpx.Response:
        raise HostUnreachable("expected host a to answer")

    with pytest.raises(HostUnreachable):
        await load_on(lost)


async def test_what_is_under_way_when_the_time_is_over_is_cut() -> None:
    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield event(choices=[{"text": " sun"}]).encode()
            await asyncio.Event().wait()

    measured, _ = await load_on(lambda _: httpx.Response(200, stream=Endless()), limit=0.2)
    assert all(s.cut and not s.fault for s in measured.samples)


# What `vllm bench serve --save-result` writes, as far as it is read, and some of the rest.
VLLM = {
    "date": "20261128-023700", "backend": "openai", "request_rate": "inf", "burstiness": 1.0,
    "num_prompts": 20, "max_concurrency": 4, "duration": 6.25, "completed": 20, "failed": 0,
    "total_input_tokens": 163, "total_output_tokens": 160, "request_throughput": 3.2,
    "output_throughput": 25.6, "mean_ttft_ms": 41.0, "median_ttft_ms": 40.0, "p95_ttft_ms": 75.5,
    "p99_ttft_ms": 80.0, "mean_tpot_ms": 21.0, "median_tpot_ms": 20.0, "p99_tpot_ms": 30.0,
}  # fmt: skip
VLLM_LOAD = Benchmark(requests=20, concurrency=4, input_length=8, output_length=8)


def of_vllm(given: Benchmark = VLLM_LOAD, **changes: Any) -> Figures:
    return vllm_bench.figures(
        json.dumps(VLLM | changes), given, generation="1-a", when=datetime.now(UTC), by="me"
    )


def test_figures_of_vllms_own_generator_are_read_and_compared_with_its_own_alone() -> None:
    figures = of_vllm()
    assert (figures.ttft, figures.ttft_p95, figures.tpot, figures.tpot_p95) == (
        0.04, 0.0755, 0.02, None,
    )  # fmt: skip
    assert (figures.throughput, figures.answered, figures.failed) == (25.6, 20, 0)
    fewer = {"completed": 18, "total_input_tokens": 146, "total_output_tokens": 144}
    assert of_vllm(**fewer).failed == 2
    assert str(figures.load).endswith(", by vllm bench")
    ours = figures.model_copy(update={"load": Load.of(VLLM_LOAD), "tpot": 0.001})
    assert not judge(figures, VLLM_LOAD, [ours], ["1-a"]).faults
    faster = figures.model_copy(update={"tpot": 0.001})
    assert judge(figures, VLLM_LOAD, [faster], ["1-a"]).faults


def test_a_result_of_vllm_0_32_is_read() -> None:
    """`vllm bench serve` wrote it, of a 1P1D on CPUs."""
    result = (example.ROOT / "tests/data/vllm-bench.json").read_text()
    load = Benchmark(requests=20, concurrency=2, input_length=64, output_length=16)
    figures = vllm_bench.figures(
        result, load, generation="1-a", when=datetime.now(UTC), by="somebody"
    )
    assert (figures.answered, figures.failed) == (20, 0)
    assert figures.ttft == pytest.approx(0.0593, abs=1e-4)
    assert figures.tpot_p95 == pytest.approx(0.00395, abs=1e-5)
    assert figures.throughput == pytest.approx(279.9, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_prompts": 30}, "--num-prompts: expected 20, as gates.benchmark.requests says"),
        ({"max_concurrency": None}, "--max-concurrency: expected 4"),
        ({"total_input_tokens": 400}, "--random-input-len: expected 8"),
        ({"total_output_tokens": 100}, "--random-output-len: expected 8"),
        ({"median_ttft_ms": None}, "expected what `vllm bench serve --save-result` writes"),
    ],
)
def test_a_result_of_another_load_is_refused_with_the_option(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        of_vllm(**changes)
    assert says in str(refused.value)


def test_limits_for_95_percent_need_that_percentile() -> None:
    limited = VLLM_LOAD.model_copy(update={"limits": BenchmarkLimits(tpot=1)})
    with pytest.raises(InvalidInput, match="--metric-percentiles: expected 95"):
        of_vllm(limited)


SPEED = {"gates": {"benchmark": {
    "requests": 20, "concurrency": 4, "input_length": 8, "output_length": 8,
}}}  # fmt: skip
FAST, SLOW = {"d0": Faults(token_seconds=0.5)}, {"d0": Faults(token_seconds=0.9)}


def test_a_slower_build_is_rolled_back_and_its_image_to_blame_where_only_that_is_new(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.change(**SPEED)
    assert world.run(deploy, image=world.push("20250723_1", FAST)).completed
    first = world.serving()
    history, result = world.asked(bench.measured(load_deployment(world.path), save=True))
    assert result.figures.load.requests == 20
    assert "now, saved" in bench.text(history, result, world.path, save=True)
    document = json.loads(bench.as_document(result))
    given = json.dumps(VLLM | {"median_tpot_ms": 5000.0})
    asked = bench.measured(load_deployment(world.path), save=False, result=given)
    history, read = world.asked(asked)
    assert (read.figures.generation, read.figures.tpot, read.failed) == (first, 5.0, False)
    assert "nothing to compare with" in bench.text(history, read, world.path, save=False)
    assert (document["tpot"], document["worse"], document["passed"]) == (0.5, [], True)
    said = str(world.run(deploy, image=world.push("20250724_1", SLOW)).error)
    assert "failed at `benchmark` because" in said
    assert f"TPOT is 900 ms instead of 500 ms with generation {first} (at most 600 ms" in said
    assert re.search(r"down for \d+\.\d s, \d+\.\d s of it for the benchmark", said)
    quarantined = [one.image.rpartition(":")[2] for one in world.record().quarantine.values()]
    assert quarantined == ["20250724_1"]
    kept = world.record().figures
    assert {f.generation for f in kept if f.passed} == {first}
    assert [(f.tpot, f.passed) for f in kept] == [(0.5, True), (0.5, True), (0.9, False)]
    world.change(settings={"decode": {"environment": {"EXAMPLE": "1"}}})
    said = str(world.run(deploy, image=world.push("20250725_1", SLOW)).error)
    assert "TPOT is 900 ms instead of 500 ms" in said
    assert len(world.record().quarantine) == 1, "the file was changed as well"
    assert world.serving() == first
    world.assert_coherent()
