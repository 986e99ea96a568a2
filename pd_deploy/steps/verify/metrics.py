"""Counters in Prometheus' text format, as servers show them on /metrics. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence

from pd_deploy.engines.base import Counter

Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""Name → its samples: labels and value."""

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?", re.ASCII)
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"', re.ASCII)


def parse(text: str) -> Samples:
    """The samples of a page of metrics; what is none is left out."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line.strip())
        value = _number(match[3]) if match else None
        if match and value is not None:
            labels = dict(_LABEL.findall(match[2] or ""))
            found.setdefault(match[1], []).append((labels, value))
    return found


def total(pages: Iterable[Samples], counter: Counter) -> float | None:
    """The sum of a counter's samples over some servers; None where none of them has it."""
    samples = [sample for page in pages for sample in page.get(counter.name, ())]
    wanted = dict(counter.labels).items()
    chosen = [value for labels, value in samples if wanted <= labels.items()]
    return sum(chosen) if samples else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
