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
BUSY = 0.9
"""Share of one core from which on the load generator, not the service, may be the limit."""
UNLEARNED, LEAST, MOST = 0.2, 0.05, 0.5
LEARNS_FROM = 3
"""Differences between successive figures from which on a tolerance is learned."""
# A normal distribution's standard deviation is 1.48 times its median absolute value; of differences
# of two figures, that is what a new one differs by. Three of these are rarely exceeded by chance.
SPREADS = 3 * 1.4826
BAR = 24

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
        generator: what asked; empty for pd-deploy's own load generator.
    """

    requests: int
    concurrency: int
    input_length: int
    output_length: int
    generator: str = ""

    @classmethod
    def of(cls, benchmark: Benchmark) -> "Load":
        """Take the load out of the file's benchmark."""
        return cls(**benchmark.model_dump(include=set(cls.model_fields)))

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.concurrency} at a time, of {self.input_length} tokens"
            f" for {self.output_length}" + (f", by {self.generator}" if self.generator else "")
        )


@dataclass(frozen=True)
class Sample:
    """One request; times are in seconds.

    Attributes:
        ttft: None if no token came.
        tpot: None if there were not two tokens.
        fault: why it failed; empty if it was answered.
        cut: whether it was given up because the benchmark's time was over.
    """

    tokens: int
    ttft: float | None = None
    tpot: float | None = None
    fault: str = ""
    cut: bool = False


class Figures(_Frozen):
    """What a load found; times are in seconds.

    Attributes:
        by: what measured it.
        answered: requests that were; the others failed, or were cut when the time was over.
        seconds: how long the load took.
        ttft, tpot: medians; None if there were none.
        ttft_p95, tpot_p95: what 95 % of the requests were within.
        throughput: output tokens per second, of all requests together.
        delay: by how much the load generator itself noticed events late, 95th percentile.
        busy: share of a core that it used.
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
    delay: float = 0.0
    busy: float = 0.0
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
        """Whether others can be compared with them: enough answers, no failure, and a load
        generator that was not the limit."""
        return self.answered >= ENOUGH and not self.failed and self.busy < BUSY

    @property
    def at_best(self) -> "Figures":
        """The figures less all that the load generator's own delay can explain of them."""
        tokens = self.load.output_length
        rounds = self.answered / self.load.concurrency
        working = max(self.seconds - rounds * self.delay, self.seconds / 2)
        less = {
            "ttft": _less(self.ttft, self.delay),
            "ttft_p95": _less(self.ttft_p95, self.delay),
            "tpot": _less(self.tpot, self.delay / max(tokens - 1, 1)),
            "tpot_p95": _less(self.tpot_p95, self.delay / max(tokens - 1, 1)),
            "throughput": self.throughput * self.seconds / working if working else self.throughput,
        }
        return self.model_copy(update=less)


def summed_up(
    samples: Sequence[Sample],
    load: Load,
    *,
    generation: str,
    when: datetime,
    by: str,
    seconds: float,
    delays: Sequence[float] = (),
    busy: float = 0.0,
) -> Figures:
    """Sum up what a load's requests found."""
    answered = [s for s in samples if not s.fault and not s.cut]
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
        throughput=_short(sum(s.tokens for s in samples if not s.fault) / max(seconds, 1e-9)),
        delay=_short(percentile(delays, 95) or 0.0),
        busy=_short(busy),
    ).model_copy(update={n: _short(value) for n, value in latencies.items() if value is not None})


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
    remarks = _unjudged(figures, before)
    over = _over_limits(figures, benchmark.limits, before)
    found = [*over, *_worse(figures, benchmark, same, before)]
    if not figures.answered and not figures.failed:
        found = [(f"no request was answered in {figures.seconds:.0f} s", bool(before))]
    faults = tuple(text for text, _ in found)
    if figures.busy >= BUSY:
        said = f"; otherwise it would count that {' and '.join(faults)}" if faults else ""
        remark = (
            f"not judged: pd-deploy itself used {figures.busy:.0%} of a core, so the load, not the "
            f"service, may have been the limit{said}. Lower `concurrency`, or run it on a faster "
            "machine"
        )
        return Judgement(remarks=(remark, *remarks))
    did_better = bool(before) if figures.failed else any(better for _, better in found)
    return Judgement(faults, remarks, did_better)


def _unjudged(figures: Figures, before: Sequence[Figures]) -> tuple[str, ...]:
    remarks = []
    if figures.answered < ENOUGH:
        remarks.append(
            f"TTFT and TPOT not judged: only {figures.answered} requests were answered in "
            f"{figures.seconds:.0f} s, and {ENOUGH} are needed"
        )
    if not before:
        remarks.append("nothing to compare with: no good generation has figures of this load")
    return tuple(remarks)


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
        now, found = figures.at_best.value(metric), figures.value(metric)
        if old is None or now is None or found is None or not _is_judged(metric, figures):
            continue
        share = benchmark.tolerance
        if share == "learned":
            share = tolerance([v for f in same if (v := f.value(metric)) is not None])
        bound = old / (1 + share) if metric == HIGHER_IS_BETTER else old * (1 + share)
        if not _keeps(metric, now, bound):
            yield (
                f"{name} is {shown(metric, found)} instead of {shown(metric, old)} with generation "
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
        now, found = figures.at_best.promised(metric), figures.promised(metric)
        if limit is None or now is None or found is None or not _is_judged(metric, figures):
            continue
        if not _keeps(metric, now, limit):
            of = "" if metric == HIGHER_IS_BETTER else " for 95 % of the requests"
            old = _median(f.promised(metric) for f in before)
            was = f"; generation {before[0].generation} had {shown(metric, old)}" if old else ""
            yield (
                f"{name}{of} is {shown(metric, found)} ({_bound(metric, limit)} by "
                f"gates.benchmark.limits.{metric}{was})",
                old is not None and _keeps(metric, old, limit),
            )


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


def _less(value: float | None, delay: float) -> float | None:
    return None if value is None else max(value - delay, 0.0)


def _short(value: float) -> float:
    """Round to four digits: more of them are noise, and the record is small."""
    return float(f"{value:.4g}")
