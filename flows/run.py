"""The flow run itself: its name, its page in the UI, and who or what started it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from prefect import runtime
from prefect.context import FlowRunContext

FLEET = "pd-fleet"
"""Tag of runs that a roll through a fleet started."""


@dataclass(frozen=True)
class Run:
    """A flow run, as messages and records name it.

    Attributes:
        late: how long after its scheduled time it started, if a schedule started it.
    """

    name: str
    url: str
    started_by: str
    scheduled: bool
    late: timedelta

    def __str__(self) -> str:
        where = f" ({self.url})" if self.url else ""
        return f"run {self.name!r}{where} by {self.started_by}"


def this_run() -> Run:
    """Return the flow run that this code is part of."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    assert flow_run is not None
    creator = flow_run.created_by.display_value if flow_run.created_by else None
    scheduled = bool(flow_run.auto_scheduled)
    by_fleet = FLEET in flow_run.tags
    started_by = "the schedule" if scheduled else FLEET if by_fleet else creator or "hand"
    url = runtime.flow_run.ui_url if flow_run.deployment_id else None
    now = datetime.now(UTC)
    due = flow_run.expected_start_time if scheduled else None
    return Run(flow_run.name, url or "", started_by, scheduled, now - (due or now))


def remedy() -> str:
    """Name the command that repairs what this run may leave."""
    return f"`pd-deploy recover {runtime.flow_run.parameters.get('file', 'FILE')}`"
