"""Steps in sequence, each on many hosts at once: their reports, and what the next ones wait for."""

from collections.abc import Awaitable, Iterable

from pd_deploy.flows.fan_out import fan_out
from pd_deploy.steps.barrier import Barrier
from pd_deploy.steps.report import Report
from pd_deploy.steps.timeline import Timeline
from pd_deploy.tasks import gate
from pd_deploy.tasks.step import Result


class Line:
    """A line of steps, in the order of the runbook.

    Attributes:
        reports: of all steps so far.
        ends: results of the last steps: what those that come next wait for.
        timeline: of the run, whose phase the names of gates begin with.
    """

    def __init__(self, barrier: Barrier, timeline: Timeline, *after: Result) -> None:
        self.barrier = barrier
        self.timeline = timeline
        self.reports: list[Report] = []
        self.ends: tuple[Result, ...] = after

    async def together(self, steps: Iterable[Awaitable[Report]]) -> None:
        """Run steps at the same time; if there are any, they become the line's new ends."""
        reports = await fan_out(self.barrier, steps)
        self.reports += reports
        self.ends = tuple(reports) or self.ends

    async def branches(self, branches: Iterable[Awaitable["Line"]]) -> None:
        """Run lines at the same time, each with its own steps; their ends become this one's."""
        lines = [line for line in await fan_out(self.barrier, branches) if line.reports]
        self.reports += [report for line in lines for report in line.reports]
        self.ends = tuple(end for line in lines for end in line.ends) or self.ends

    def branch(self, *after: Result) -> "Line":
        """Start a line where this one is now, and after further steps."""
        return Line(self.barrier, self.timeline, *self.ends, *after)

    async def joined(self, name: str) -> None:
        """Join the ends in one gate, so that N steps after N others have N + N edges, not N x N.

        Args:
            name: what is so from there on, as the UI shows it.
        """
        if len(self.ends) > 1:
            self.ends = (await gate.after(*self.ends)(f"{self.timeline.prefix}{name}"),)
