"""When each step of a run began and how it ended, phase by phase, and a picture of it. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

LOOK, PREPARE, CUT_OVER, SERVE, TIDY = "look", "prepare", "cut-over", "serve", "tidy up"
WAY_BACK = "way back"
DOWN = "down"
WIDTH = 48  # characters of the picture's bars
BAR, GAP = "█", "░"


@dataclass(frozen=True)
class Took:
    """A step that has ended; one that was retried is there for each time.

    Attributes:
        verb: what the step does, such as `start server`.
        subject: the instance or host; empty for a step of the whole run.
        phase: the part of the run that it belongs to.
        detail: what it did or found, in a few words, or why it failed.
    """

    verb: str
    subject: str
    phase: str
    begin: datetime
    end: datetime
    detail: str = ""
    changed: bool = False
    failed: bool = False

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.begin).total_seconds()

    @property
    def name(self) -> str:
        """Its name as the UI has it."""
        return f"{self.verb} {self.subject}".strip()


@dataclass
class Timeline:
    """The steps of one run so far, and the phase that it is in. The way back is one phase."""

    steps: list[Took] = field(default_factory=list)
    phase: str = LOOK

    def enter(self, phase: str) -> None:
        """Begin a phase, unless this is on the way back."""
        if not self.is_way_back:
            self.phase = phase

    @property
    def is_way_back(self) -> bool:
        """Whether the run brings back what served before."""
        return self.phase == WAY_BACK

    @property
    def prefix(self) -> str:
        """What the names of tasks begin with, so that those of a phase are found together in the
        UI, and the way back is told from the attempt; nothing until a phase begins."""
        return "" if self.phase == LOOK else f"{self.phase}: "

    def phases(self) -> dict[str, list[Took]]:
        """Return the steps of each phase, in the order in which they began."""
        by_phase: dict[str, list[Took]] = {}
        for step in sorted(self.steps, key=lambda step: step.begin):
            by_phase.setdefault(step.phase, []).append(step)
        return by_phase


def waterfall(
    timeline: Timeline, down: tuple[datetime, datetime] | None = None, width: int = WIDTH
) -> list[str]:
    """Draw when each phase, and in it each kind of step, was under way, and when nothing served.

    Steps of a kind share a bar, from the first's beginning to the last's end: its length does not
    grow with the hosts.

    Args:
        down: from when clients could not connect until they could again.
    """
    rows: list[tuple[str, datetime, datetime, str]] = []
    for phase, steps in timeline.phases().items():
        rows.append((phase, *_span(steps), BAR))
        kinds: dict[str, list[Took]] = {}
        for step in steps:
            kinds.setdefault(step.verb, []).append(step)
        for verb, same in kinds.items():
            count = f" ×{len(same)}" if len(same) > 1 else ""
            failed = " ✗" if any(step.failed for step in same) else ""
            rows.append((f"  {verb}{count}{failed}", *_span(same), GAP))
    if not rows:
        return []
    begin, end = min(row[1] for row in rows), max(row[2] for row in rows)
    if down and down[1] > begin:
        rows.append((DOWN, max(down[0], begin), min(down[1], end), "▓"))
    longest = max(len(name) for name, *_ in rows)
    scale = (end - begin) / width or timedelta(microseconds=1)
    lines = []
    for name, since, until, mark in rows:
        first = min(int((since - begin) / scale), width - 1)
        length = max(round((until - since) / scale), 1)
        bar = " " * first + mark * min(length, width - first)
        lines.append(f"{name:{longest}} {(until - since).total_seconds():8.1f} s  {bar}".rstrip())
    return lines


def tables(timeline: Timeline) -> list[str]:
    """Write the steps as a table for each phase, in Markdown; those that failed in bold."""
    lines: list[str] = []
    for phase, steps in timeline.phases().items():
        begin, end = _span(steps)
        title = f"{phase[0].upper()}{phase[1:]}"
        lines += ["", f"### {title}, {(end - begin).total_seconds():.1f} s", ""]
        lines += ["| step | of | changed | what | s |", "|---|---|---|---|---|"]
        lines += map(_row, steps)
    return lines


def _row(step: Took) -> str:
    detail = step.detail.replace("|", "\\|")
    detail = f"**failed:** {detail}" if step.failed else detail
    changed = "yes" if step.changed else ""
    return f"| {step.verb} | {step.subject} | {changed} | {detail} | {step.seconds:.1f} |"


def _span(steps: Sequence[Took] | Iterable[Took]) -> tuple[datetime, datetime]:
    steps = list(steps)
    return min(step.begin for step in steps), max(step.end for step in steps)
