"""Whether anything grows in the course of a soak: an early tenth of it against its last. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TENTHS = 10
ENOUGH = 2  # samples: the first and the last


@dataclass(frozen=True)
class Limit:
    """How much larger a figure may be in the end: by an amount, and by a share of what it was.

    Attributes:
        settles: share of the samples after which it has its size; what it was is taken then.
    """

    amount: float = 0.0
    share: float = 0.0
    settles: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """One figure: its medians in the first tenth of the samples, or in the one that follows when it
    has settled, and in the last.

    Attributes:
        allowed: what it may be in the end; None if it is only told.
    """

    name: str
    first: float
    last: float
    allowed: float | None

    @property
    def grew(self) -> bool:
        """Whether it is larger in the end than it may be."""
        return self.allowed is not None and self.last > self.allowed


def compare(
    samples: Sequence[Mapping[str, float]], limits: Mapping[str, Limit]
) -> list[Comparison]:
    """Compare the first tenth of the samples that counts with the last, figure by figure.

    Args:
        samples: each with the same figures, in the order in which they were taken.
        limits: by figure; one without a limit is only told.
    """
    if len(samples) < ENOUGH:
        return []
    tenth = -(-len(samples) // TENTHS)
    return [_compared(name, samples, tenth, limits.get(name)) for name in samples[0]]


def _compared(
    name: str, samples: Sequence[Mapping[str, float]], tenth: int, limit: Limit | None
) -> Comparison:
    begin = int(len(samples) * limit.settles) if limit else 0
    first = statistics.median(sample[name] for sample in samples[begin : begin + tenth])
    last = statistics.median(sample[name] for sample in samples[-tenth:])
    allowed = first * (1 + limit.share) + limit.amount if limit else None
    return Comparison(name, first, last, allowed)
