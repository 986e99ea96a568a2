"""Benchmarks: the figures of a load, and whether they are worse than they may be. Pure.

TTFT is the time to the first token, TPOT the time per output token after it. Medians are compared
with those of the last good generation, because they are steadier than the tail; the file's own
limits are for 95 % of the requests, because that is what clients are promised.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pd_deploy.config.models import Benchmark, BenchmarkLimits

KEPT = 20
"""Figures that a record keeps: the record is read and written at each run."""
ENOUGH = 20
"""Answers from which on a 95th percentile is more than the slowest answer."""
UNLEARNED, LEAST, MOST = 0.2, 0.05, 0.5
LEARNS_FROM = 3
"""Differences between successive figures from which on a tolerance is learned."""
# A normal distribution's standard deviation is 1.48 times its median absolute value; of differences
# of two figures, that is what a new one differs by. Three of these are rarely exceeded by chance.
SPREADS = 3 * 1.4826
BAR = 24
FORMER_GENERATOR = "pd-deploy's former load generator"

Metric = Literal["ttft", "tpot", "throughput"]
NAMES: dict[Metric, str] = {"ttft": "TTFT", "tpot": "TPOT", "throughput": "throughput"}
HIGHER_IS_BETTER: Metric = "throughput"


Fault = tuple[str, bool]
"""What is worse than it may be, in words, and whether the generation before did better."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Load(_Frozen):
    """What was asked: figures of different loads can't be compared. Lengths are in tokens.

    Attributes:
        generator: what asked; empty in records of older versions, which had one of their own.
    """

    requests: int
    concurrency: int
    input_length: int
    output_length: int
    generator: str = ""

    @classmethod
    def of(cls, benchmark: Benchmark, generator: str) -> "Load":
        """Take the load out of the file's benchmark."""
        asked = benchmark.model_dump(include=set(cls.model_fields))
        return cls(**asked, generator=generator)

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.concurrency} at a time, of {self.input_length} tokens"
            f" for {self.output_length}, by {self.generator or FORMER_GENERATOR}"
        )


@dataclass(frozen=True)
class Sample:
    """One request; times are in seconds.

    Attributes:
        ttft: None if no token came.
        tpot: None if there were not two tokens.
        fault: why it failed; empty if it was answered.
    """

    tokens: int
    ttft: float | None = None
    tpot: float | None = None
    fault: str = ""


class Figures(_Frozen):
    """What a load found; times are in seconds.

    Attributes:
        by: what measured it.
        version: that of the load generator; empty where it is not known.
        answered: requests that were; none of a load that did not end in time.
        seconds: how long the load took.
        ended: whether it ended in time; if not, its throughput was lower than what is here.
        ttft, tpot: medians; None if there were none.
        ttft_p95, tpot_p95: what 95 % of the requests were within.
        throughput: output tokens per second, of all requests together.
        passed: whether the generation was let through.
    """

    generation: str
    when: datetime
    by: str
    load: Load
    answered: int
    failed: int
    seconds: float
    ttft: float | None = None
    ttft_p95: float | None = None
    tpot: float | None = None
    tpot_p95: float | None = None
    throughput: float
    version: str = ""
    ended: bool = True
    passed: bool = True

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {shown(metric, value)}"
            for metric, name in NAMES.items()
            if (value := self.value(metric)) is not None
        )

    def value(self, metric: Metric) -> float | None:
        """Return the figure by which generations are compared."""
        return {"ttft": self.ttft, "tpot": self.tpot, "throughput": self.throughput}[metric]

    def promised(self, metric: Metric) -> float | None:
        """Return the figure for which the file has limits."""
        tails = {"ttft": self.ttft_p95, "tpot": self.tpot_p95, "throughput": self.throughput}
        return tails[metric]

    @property
    def steady(self) -> bool:
        """Whether others can be compared with them: enough answers, and no failure."""
        return self.answered >= ENOUGH and not self.failed


def summed_up(
    samples: Sequence[Sample],
    load: Load,
    *,
    generation: str,
    when: datetime,
    by: str,
    seconds: float,
    version: str = "",
) -> Figures:
    """Sum up what a load's requests found."""
    answered = [s for s in samples if not s.fault]
    ttft = [s.ttft for s in answered if s.ttft is not None]
    tpot = [s.tpot for s in answered if s.tpot is not None]
    latencies = {
        "ttft": percentile(ttft, 50),
        "ttft_p95": percentile(ttft, 95),
        "tpot": percentile(tpot, 50),
        "tpot_p95": percentile(tpot, 95),
    }
    return Figures(
        generation=generation,
        when=when,
        by=by,
        load=load,
        answered=len(answered),
        failed=sum(bool(s.fault) for s in samples),
        seconds=_short(seconds),
        throughput=_short(sum(s.tokens for s in answered) / max(seconds, 1e-9)),
        version=version,
    ).model_copy(update={n: _short(value) for n, value in latencies.items() if value is not None})


def unended(
    load: Load, *, generation: str, when: datetime, by: str, seconds: float, version: str = ""
) -> Figures:
    """Return what is known of a load that did not end in so many seconds."""
    return Figures(
        generation=generation,
        when=when,
        by=by,
        load=load,
        answered=0,
        failed=0,
        seconds=seconds,
        throughput=_short(load.requests * load.output_length / seconds),
        version=version,
        ended=False,
    )


def shares(benchmark: Benchmark, count: int) -> list[Benchmark]:
    """Divide a load among so many proxies, or among as many as there are requests at a time."""
    count = min(count, benchmark.requests, benchmark.concurrency)
    return [
        benchmark.model_copy(
            update={
                key: (getattr(benchmark, key) + number) // count
                for key in ("requests", "concurrency")
            }
        )
        for number in range(count)
    ]


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Return what so many percent of the values are within, interpolated; None if there are none.

    Args:
        percent: from 1 to 99.
    """
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def tolerance(values: Sequence[float]) -> float:
    """Learn by which share a figure may be worse, from those kept, in the order of their time.

    Successive figures are compared, so that a service that became faster once, and stayed so, does
    not count as one whose figures vary.
    """
    steps = [abs(math.log(b / a)) for a, b in pairwise(values) if a > 0 and b > 0]
    if len(steps) < LEARNS_FROM:
        return UNLEARNED
    spread = min(SPREADS * statistics.median(steps), math.log1p(MOST))
    return max(math.expm1(spread), LEAST)


@dataclass(frozen=True)
class Judgement:
    """What figures mean.

    Attributes:
        faults: what is worse than it may be, with both figures.
        remarks: what could not be judged, and why.
        of_the_generation: whether the generation before did better by the same load, so that the
            faults are not those of the load or of the limits.
    """

    faults: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    of_the_generation: bool = False


def judge(
    figures: Figures, benchmark: Benchmark, kept: Sequence[Figures], good: Sequence[str]
) -> Judgement:
    """Compare figures with the file's limits and with the last good generation's.

    Args:
        kept: all figures that are known, in the order of their time.
        good: the generations that passed all gates, the last one last.
    """
    same = [f for f in kept if f.load == figures.load and f.passed and f.steady]
    before = _last(same, good)
    found = [*_over_limits(figures, benchmark.limits, before)]
    found += _worse(figures, benchmark, same, before)
    if not figures.ended:
        found = [_late(figures, benchmark, same, before)]
    did_better = bool(before) if figures.failed else any(better for _, better in found)
    faults = tuple(text for text, _ in found)
    return Judgement(faults, tuple(_remarks(figures, before)), did_better)


def _remarks(figures: Figures, before: Sequence[Figures]) -> Iterable[str]:
    if figures.ended and figures.answered < ENOUGH:
        yield (
            f"TTFT and TPOT not judged: only {figures.answered} requests were answered, and "
            f"{ENOUGH} are needed"
        )
    if not before:
        yield "nothing to compare with: no good generation has figures of this load"
    others = {f.version for f in before if f.version} - {figures.version}
    if figures.version and others:
        yield (
            f"{figures.load.generator} is {figures.version} now, and was "
            f"{' or '.join(sorted(others))} for generation {before[0].generation}: it may be what "
            "made a difference"
        )


def _last(same: Sequence[Figures], good: Sequence[str]) -> list[Figures]:
    """Return the figures of the last good generation that has any."""
    for name in reversed(good):
        if its := [f for f in same if f.generation == name]:
            return its
    return []


def _worse(
    figures: Figures, benchmark: Benchmark, same: Sequence[Figures], before: Sequence[Figures]
) -> Iterable[Fault]:
    """List what is worse than the generation before had, by more than the tolerance."""
    for metric, name in NAMES.items():
        old = _median(f.value(metric) for f in before)
        now = figures.value(metric)
        if old is None or now is None or not _is_judged(metric, figures):
            continue
        share = _tolerance(metric, benchmark, same)
        bound = old / (1 + share) if metric == HIGHER_IS_BETTER else old * (1 + share)
        if not _keeps(metric, now, bound):
            yield (
                f"{name} is {shown(metric, now)} instead of {shown(metric, old)} with generation "
                f"{before[0].generation} ({_bound(metric, bound)} by a tolerance of {share:.0%})",
                True,
            )


def _over_limits(
    figures: Figures, limits: BenchmarkLimits, before: Sequence[Figures]
) -> Iterable[Fault]:
    """List what does not keep the file's limits; not that generation is to blame if the one before
    did not keep them either."""
    for metric, name in NAMES.items():
        limit: float | None = getattr(limits, metric)
        now = figures.promised(metric)
        if limit is None or now is None or not _is_judged(metric, figures):
            continue
        if not _keeps(metric, now, limit):
            of = "" if metric == HIGHER_IS_BETTER else " for 95 % of the requests"
            old = _median(f.promised(metric) for f in before)
            was = f"; generation {before[0].generation} had {shown(metric, old)}" if old else ""
            yield (
                f"{name}{of} is {shown(metric, now)} ({_bound(metric, limit)} by "
                f"gates.benchmark.limits.{metric}{was})",
                old is not None and _keeps(metric, old, limit),
            )


def _late(
    figures: Figures, benchmark: Benchmark, same: Sequence[Figures], before: Sequence[Figures]
) -> Fault:
    """Say what a load that did not end in time proves: how high its throughput can be at most."""
    most, metric = figures.throughput, HIGHER_IS_BETTER
    said = f"it did not end in {figures.seconds:g} s, so throughput is below {shown(metric, most)}"
    old = _median(f.throughput for f in before)
    if old is None:
        return said, False
    share = _tolerance(metric, benchmark, same)
    was = f"; generation {before[0].generation} had {shown(metric, old)}"
    return said + was, most < old / (1 + share)


def _tolerance(metric: Metric, benchmark: Benchmark, same: Sequence[Figures]) -> float:
    """Return the file's tolerance, or what is learned of all figures of this load."""
    if benchmark.tolerance != "learned":
        return benchmark.tolerance
    return tolerance([value for f in same if (value := f.value(metric)) is not None])


def _is_judged(metric: Metric, figures: Figures) -> bool:
    return metric == HIGHER_IS_BETTER or figures.answered >= ENOUGH


def _keeps(metric: Metric, value: float, bound: float) -> bool:
    return value >= bound if metric == HIGHER_IS_BETTER else value <= bound


def _bound(metric: Metric, bound: float) -> str:
    least_or_most = "at least" if metric == HIGHER_IS_BETTER else "at most"
    return f"{least_or_most} {shown(metric, bound)}"


def shown(metric: Metric, value: float) -> str:
    """Write a figure with its unit."""
    if metric == "throughput":
        return f"{value:.0f} tokens/s" if value >= 10 else f"{value:.2g} tokens/s"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def of_generation(kept: Iterable[Figures], generation: str) -> Figures | None:
    """Return the last figures of a generation."""
    return next((f for f in reversed([*kept]) if f.generation == generation), None)


def as_markdown(kept: Sequence[Figures]) -> list[str]:
    """Draw the kept figures that have the last one's load, with bars for their throughput."""
    if not kept:
        return []
    same = [f for f in kept if f.load == kept[-1].load]
    most = max(f.throughput for f in same) or 1
    return [
        f"Benchmark: {kept[-1].load}",
        "",
        "| generation | | TTFT | TPOT | tokens/s | |",
        "|---|---|---|---|---|---|",
        *(
            f"| {f.generation} | {f.when:%Y-%m-%d %H:%M}{'' if f.passed else ', refused'} "
            f"| {shown('ttft', f.ttft) if f.ttft is not None else ''} "
            f"| {shown('tpot', f.tpot) if f.tpot is not None else ''} "
            f"| {f.throughput:.0f} | {'█' * max(round(BAR * f.throughput / most), 1)} |"
            for f in same
        ),
        "",
    ]


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def _short(value: float) -> float:
    """Round to four digits: more of them are noise, and the record is small."""
    return float(f"{value:.4g}")
