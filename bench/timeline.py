"""Which part of a flow run took how long. Pure."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

ENGINE = "engine loads"
READY = "ready"
BETWEEN = "between steps"

# First words of the names of task runs → part of the run, in the order of the runbook.
PARTS = {
    "connect": "connect",
    "lock": "lock",
    "survey": "survey",
    "choose image": "survey",
    "resolve image": "survey",
    "read code": "survey",
    "identify image": "survey",
    "device addresses": "survey",
    "plan": "survey",
    "saved plan": "survey",
    "preflight": "preflight",
    "compare hosts": "preflight",
    "inspect": "preflight",
    "try ports": "preflight",
    "ping devices": "preflight",
    "check plan": "preflight",
    "pull": "image present",
    "image on all hosts": "image present",
    "bring code": "image present",
    "code on all hosts": "image present",
    "find load generator": "image present",
    "save": "launch",
    "containers and files made": "launch",
    "clean up": "clean up",
    "proxies stopped": "clean up",
    "old generation stopped": "clean up",
    "free": "clean up",
    "devices and ports free": "clean up",
    "launch": "launch",
    "prepare waiting room": "launch",
    "ranktable": "ranktable",
    "prepare proxy": "start",
    "start server": "start",
    "prefill started": "start",
    "decode started": "start",
    "ready": READY,
    "open proxy": "open proxy",
    "smoke test": "smoke test",
    "benchmark": "benchmark",
    "promote": "promote",
    "prune": "promote",
    "clear": "promote",
    "stop adopted": "clean up",
    "start again": "start",
    "ready again": READY,
    "prove adopted": "smoke test",
    "prune adopted": "promote",
}


@dataclass(frozen=True)
class Span:
    """A stretch of time."""

    start: datetime
    end: datetime

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> Self:
        """Return when a flow run or a task run, as Prefect's API has it, was under way."""
        return cls(*(datetime.fromisoformat(run[key]) for key in ("start_time", "end_time")))

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return (self.end - self.start) / timedelta(seconds=1)

    def covers(self, moment: datetime) -> bool:
        """Tell whether a moment lies in it."""
        return self.start <= moment < self.end


@dataclass(frozen=True)
class Measured:
    """One flow run; all in seconds. `parts` add up to `own`."""

    wall: float
    engine: float
    parts: Mapping[str, float]

    @property
    def own(self) -> float:
        """The control plane's own time."""
        return self.wall - self.engine


def part_of(task_run: str) -> str:
    """Return the part of the run that a task run of that name belongs to.

    Raises:
        ValueError: `PARTS` has none for it.
    """
    name = task_run.rpartition(": ")[2]  # the names of most begin with their phase
    for words, part in PARTS.items():
        if name.startswith(words):
            return part
    raise ValueError(f"expected a task run of a part in bench/timeline.py, found {task_run!r}")


def measure(flow_run: Span, tasks: Sequence[tuple[str, Span]], engine: Span | None) -> Measured:
    """Divide a flow run: count each moment for exactly one part.

    While the engine loads, a moment counts for the engine; otherwise for the earliest step of the
    runbook that is under way on any host, because the rest waits for it; otherwise for the time
    between steps.

    Args:
        flow_run: from its start to its end.
        tasks: name and time of each task run.
        engine: when all servers were started and not yet all ready; None if nothing was started.
    """
    of_part = [(part_of(name), span) for name, span in tasks]
    spans = [flow_run, *(span for _, span in tasks), *([engine] if engine else [])]
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    seconds = dict.fromkeys([ENGINE, *PARTS.values(), BETWEEN], 0.0)
    for start, end in itertools.pairwise(edges):
        if flow_run.covers(start):
            seconds[_holds(start, of_part, engine)] += Span(start, end).seconds
    return Measured(flow_run.seconds, seconds.pop(ENGINE), seconds)


def _holds(moment: datetime, tasks: Sequence[tuple[str, Span]], engine: Span | None) -> str:
    if engine and engine.covers(moment):
        return ENGINE
    active = {part for part, span in tasks if span.covers(moment)}
    return next((part for part in PARTS.values() if part in active), BETWEEN)
