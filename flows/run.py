"""The flow run itself: its name, its page in the UI, and who or what started it."""

import getpass
import os
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from prefect import runtime
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

FLEET = "pd-fleet"
"""Tag of runs that a roll through a fleet started."""
LONGEST = 200  # characters of a message: it is kept on the hosts with each run


@dataclass(frozen=True)
class Run:
    """A flow run, as messages and records name it.

    Attributes:
        late: how long after its scheduled time it started, if a schedule started it.
        message: why it was started, if somebody said so; in one line.
    """

    name: str
    url: str
    started_by: str
    scheduled: bool
    late: timedelta
    message: str = ""

    def __str__(self) -> str:
        where = f" ({self.url})" if self.url else ""
        why = f": {self.message}" if self.message else ""
        return f"run {self.name!r}{where} by {self.started_by}{why}"


@dataclass
class Page:
    """What the page of a run in the UI has so far.

    Attributes:
        deployment: the name that keys of artifacts begin with; the file's, until it is read.
        published: whether an artifact was published.
        acts: whether the run has begun to bring a generation up or back.
    """

    deployment: str
    published: bool = False
    acts: bool = False


page: ContextVar[Page] = ContextVar("page")
"""That of the run in this context."""


def this_run() -> Run:
    """Return the flow run that this code is part of."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    assert flow_run is not None
    scheduled = bool(flow_run.auto_scheduled)
    url = runtime.flow_run.ui_url if flow_run.deployment_id else None
    now = datetime.now(UTC)
    due = flow_run.expected_start_time if scheduled else None
    message = one_line(str(runtime.flow_run.parameters.get("message") or ""))
    by = starter(flow_run)
    if scheduled and context and context.flow:
        by = f"{by} of {context.flow.name}"  # a nightly's, or that of checks
    return Run(flow_run.name, url or "", by, scheduled, now - (due or now), message)


def starter(flow_run: FlowRun) -> str:
    """Name who or what started a run; a server without logins does not know who uses it."""
    if flow_run.auto_scheduled:
        return "the schedule"
    if FLEET in flow_run.tags:
        return FLEET
    if flow_run.deployment_id is None:
        return f"{os.environ.get('SUDO_USER') or getpass.getuser()}@{socket.gethostname()}"
    creator = flow_run.created_by
    if creator and creator.display_value:
        is_automation = creator.type == "AUTOMATION"
        return f"{'automation ' if is_automation else ''}{creator.display_value!r}"
    return "hand"


def one_line(text: str) -> str:
    """Write a text in one line of at most `LONGEST` characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def remedy(file: str = "") -> str:
    """Name the command that repairs what this run may leave. A recovery would need hosts that this
    run was told to forget."""
    parameters = runtime.flow_run.parameters
    gone = [f" --forget {address}" for address in parameters.get("forget") or ()]
    command = "deploy" if gone else "recover"
    return f"`pd-deploy {command} {file or parameters.get('file', 'FILE')}{''.join(gone)}`"
