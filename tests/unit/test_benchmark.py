"""Figures of a load, the tolerance that is learned from them, and what counts as worse."""

import json
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pd_deploy.cli import bench
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Benchmark, BenchmarkLimits
from pd_deploy.errors import InvalidInput
from pd_deploy.flows.deploy import deploy
from pd_deploy.records import benchmark, load_results
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
    unended,
)
from pd_deploy.records.releases import Record
from tests.memory import load
from tests.memory.machine import Faults
from tests.memory.world import World
from tests.unit import example

LOAD = Load(requests=40, concurrency=4, input_length=64, output_length=16, generator="vllm bench")
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
        ([figures("1-a", load=LOAD.model_copy(update={"generator": "sglang bench"}))], ["1-a"]),
    ],
    ids=["none", "not good", "another load", "refused", "failures", "too few", "not its own"],
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


def test_another_version_of_the_generator_is_compared_and_said() -> None:
    kept = [figures("1-a", version="0.9.0")]
    judged = judge(figures(version="0.14.0", ttft=0.5), GIVEN, kept, ["1-a"])
    assert judged.faults
    assert judged.remarks == (
        "vllm bench is 0.14.0 now, and was 0.9.0 for generation 1-a: it may be what made a "
        "difference",
    )
    assert not judge(figures(version="0.9.0"), GIVEN, kept, ["1-a"]).remarks


def test_figures_that_an_older_version_has_kept_are_read_but_never_compared() -> None:
    """It had a load generator of its own."""
    former = figures("1-a", tpot=0.001).model_dump(mode="json")
    former |= {"delay": 0.004, "busy": 0.3, "load": LOAD.model_dump(exclude={"generator"})}
    record = Record.model_validate_json(json.dumps({"figures": [former]}))
    assert str(record.figures[0].load).endswith(", by pd-deploy's former load generator")
    judged = judge(figures(), GIVEN, record.figures, ["1-a"])
    assert (judged.faults, judged.of_the_generation) == ((), False)
    assert "nothing to compare with" in judged.remarks[0]


def test_too_few_answers_are_judged_by_throughput_alone_and_said() -> None:
    now = figures(answered=3, ttft=9.0, ttft_p95=9.0, throughput=1.0, seconds=60)
    judged = judge(now, GIVEN, [figures("1-a")], ["1-a"])
    assert [fault.partition(" ")[0] for fault in judged.faults] == ["throughput"]
    assert judged.remarks == (
        "TTFT and TPOT not judged: only 3 requests were answered, and 20 are needed",
    )


@pytest.mark.parametrize(
    ("kept", "said", "is_to_blame"),
    [
        ([], "", False),
        ([figures("1-a")], "; generation 1-a had 100 tokens/s", True),
        ([figures("1-a", throughput=11.0)], "; generation 1-a had 11 tokens/s", False),
    ],
    ids=["first", "faster before", "as slow before"],
)
def test_a_load_that_does_not_end_in_time_fails_by_what_that_proves(
    kept: list[Figures], said: str, is_to_blame: bool
) -> None:
    now = unended(LOAD, generation="2-b", when=datetime.now(UTC), by="", seconds=64)
    judged = judge(now, GIVEN, kept, ["1-a"])
    assert judged.faults == (f"it did not end in 64 s, so throughput is below 10 tokens/s{said}",)
    assert judged.of_the_generation == is_to_blame
    assert not now.steady


def test_failed_requests_are_no_samples() -> None:
    samples = [Sample(16, ttft=0.2, tpot=0.01), Sample(0, fault="status 500")]
    summed = summed_up(samples, LOAD, generation="1-a", when=datetime.now(UTC), by="", seconds=2.0)
    assert (summed.answered, summed.failed, summed.throughput) == (1, 1, 8.0)
    assert (summed.ttft, summed.tpot) == (0.2, 0.01)
    assert str(summed) == "TTFT 200 ms, TPOT 10 ms, throughput 8 tokens/s"


@FEW
@given(st.integers(20, 1000), st.integers(1, 40), st.integers(1, 6))
def test_proxies_share_a_load(requests: int, concurrency: int, proxies: int) -> None:
    load = GIVEN.model_copy(update={"requests": requests, "concurrency": concurrency})
    shares = benchmark.shares(load, proxies)
    assert sum(share.requests for share in shares) == requests
    assert sum(share.concurrency for share in shares) == concurrency
    assert all(share.requests and share.concurrency for share in shares)
    assert len(shares) == min(proxies, concurrency)


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
    return load_results.figures(
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
    ours = figures.model_copy(update={"load": Load.of(VLLM_LOAD, ""), "tpot": 0.001})
    assert not judge(figures, VLLM_LOAD, [ours], ["1-a"]).faults
    faster = figures.model_copy(update={"tpot": 0.001})
    assert judge(figures, VLLM_LOAD, [faster], ["1-a"]).faults


REAL = (example.ROOT / "tests/data/vllm-bench.json").read_text()
"""`vllm bench serve` of vLLM 0.32 wrote it, of a 1P1D on CPUs; texts are cut."""
REAL_LOAD = Benchmark(requests=20, concurrency=2, input_length=64, output_length=16)
BY_REQUEST = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")


@pytest.mark.parametrize("left_out", [(), BY_REQUEST], ids=["--save-detailed", "without"])
def test_a_result_of_vllm_0_32_is_read(left_out: tuple[str, ...]) -> None:
    """What follows from each request is what vLLM itself makes of all of them."""
    result = {key: value for key, value in json.loads(REAL).items() if key not in left_out}
    figures = load_results.figures(
        json.dumps(result), REAL_LOAD, generation="1-a", when=datetime.now(UTC), by="somebody"
    )
    assert (figures.answered, figures.failed) == (20, 0)
    assert figures.ttft == pytest.approx(result["median_ttft_ms"] / 1000, rel=1e-3)
    assert figures.tpot == pytest.approx(result["median_tpot_ms"] / 1000, rel=1e-3)
    assert figures.throughput == pytest.approx(result["output_throughput"], rel=1e-3)
    assert (figures.tpot_p95 is None) is bool(left_out)


def test_a_request_that_failed_says_why_and_is_no_sample() -> None:
    """As vLLM says it: with a traceback, with the reason of a status, or without a word."""
    result = {
        "duration": 2.0, "ttfts": [0.1, 0.2, 0.0, 0.0], "itls": [[0.01, 0.03], [0.01], [], []],
        "output_lens": [3, 0, 0, 0], "errors": ["", "File\nBroken: end", "Bad Gateway", ""],
    }  # fmt: skip
    samples, seconds = load_results.samples(result)
    assert seconds == 2
    assert [s.fault for s in samples] == ["", "Broken: end", "Bad Gateway", "no answer"]
    assert samples[0] == Sample(3, 0.1, 0.02)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        load_results.samples({**result, "errors": []})
    with pytest.raises(ValueError, match="validation error"):
        load_results.samples({})


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
    assert (read.figures.generation, read.figures.tpot, read.failed) == (first, 5.0, True)
    assert "worse: TPOT is 5.00 s instead of 500 ms" in bench.text(
        history, read, world.path, save=False
    )
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


def test_a_load_that_does_not_end_in_time_is_rolled_back_with_what_to_change(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.change(gates={"benchmark": SPEED["gates"]["benchmark"] | {"seconds": 30}})
    assert world.run(deploy, image=world.push("20250723_1", FAST)).completed
    said = str(world.run(deploy, image=world.push("20250724_1", SLOW)).error)
    assert "it did not end in 30 s, so throughput is below 5.3 tokens/s" in said
    assert "lower `gates.benchmark.requests`, or raise its `seconds`" in said
    assert [f.ended for f in world.record().figures] == [True, False]


def test_an_image_without_a_load_generator_is_refused_before_anything_is_stopped(
    tmp_path: Path,
) -> None:
    """Not where no load is due. It is no fault of the image's."""
    world = World(tmp_path)
    assert world.run(deploy).completed
    before, image = world.runs(), world.push("20250724_1", load_generator="")
    world.change(**SPEED)
    outcome = world.run(deploy, image=image)
    assert (
        "expected `vllm bench serve`, the image's own load generator, to measure the service; the "
        "image does not have it: package vllm 0.8.0 has no benchmarks/serve.py. This says nothing "
        "about its speed"
    ) in str(outcome.error)
    assert world.runs() == before
    assert not world.record().quarantine
    world.change(gates={"benchmark": None})
    assert world.run(deploy, image=image).completed


def test_an_image_that_does_not_say_whether_it_has_one_is_refused_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.change(**SPEED)
    said = ("Segmentation fault", 0)
    monkeypatch.setattr(load, "carried", lambda *_: said)
    outcome = world.run(deploy)
    assert "asked for it, the image printed: Segmentation fault" in str(outcome.error)
    assert not world.runs()


def test_each_proxy_carries_its_share_and_the_figures_are_of_all(tmp_path: Path) -> None:
    """Each is asked on its own host, at its own address, by a generator of its own."""
    world = World(tmp_path)
    world.change(proxy={"c1": {"host": "b"}}, **SPEED)
    assert world.run(deploy, image=world.push("20250723_1", FAST)).completed
    (kept,) = world.record().figures
    assert (kept.answered, kept.failed, kept.load.requests) == (20, 0, 20)
    # 5 times 8 tokens of half a second each, one after the other; 4 at a time at both together.
    assert (kept.seconds, kept.throughput, kept.version) == (20, 8, "0.9.0")
