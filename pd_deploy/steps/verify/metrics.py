"""Counters in Prometheus' text format, as servers show them on /metrics. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.parser import text_string_to_metric_families

from pd_deploy.engines.base import Counter

Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""Name → its samples: labels and value."""


def parse(text: str) -> Samples:
    """Parse the samples of a page of metrics; leave out what is none."""
    samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for line in text.split("\n"):
        for name, labels, value in _samples(line):
            samples.setdefault(name, []).append((labels, value))
    return samples


def total(pages: Iterable[Samples], counter: Counter) -> float | None:
    """Sum a counter's samples over some servers; return None if none of them has it."""
    samples = [sample for page in pages for sample in page.get(counter.name, ())]
    wanted_labels = dict(counter.labels).items()
    values = [value for labels, value in samples if wanted_labels <= labels.items()]
    return sum(values) * counter.scale if samples else None


def _samples(line: str) -> list[tuple[str, Mapping[str, str], float]]:
    """Parse the samples of a line; none if it is a comment, or not a sample.

    The parser gets one line at a time: after a line that it refuses it would drop the rest of the
    page, and a counter's type would change the names of its samples.
    """
    try:
        families = list(text_string_to_metric_families(line))
        samples = [sample for family in families for sample in family.samples]
        return [(sample.name, sample.labels, float(sample.value)) for sample in samples]
    # Not all that it stumbles over is a ValueError: `a{b="c", =""} 1`, a number of 400 digits.
    except (ValueError, IndexError, OverflowError):
        return []
