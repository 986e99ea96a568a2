"""Running the flow here, and following a run elsewhere."""

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import typer
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkQueueFilter,
    WorkQueueFilterId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import TerminationSignal
from prefect.types import DateTime

from pd_deploy.cli.exit_codes import FAILED, of_a_run
from pd_deploy.cli.prefect_api import ServerLost, served
from pd_deploy.cli.telling import named, remember, tell
from pd_deploy.errors import InvalidInput, PdDeployError
from pd_deploy.flows.interrupts import Ending, ending

POLL_INTERVAL_S = 0.5
PAGE = 200  # of task runs; the server gives no more at a time
QUIET_POLLS = 4
LOST = "the Prefect server was lost during the run, and does not know how it ended"
QUEUED = "AwaitingConcurrencySlot"
CHANGING = ("pd-deploy", "pd-rollback", "pd-recover")
FLOWS = [*CHANGING, "pd-prune", "pd-teardown", "pd-fleet", "pd-preflight"]
"""Those that somebody may want to follow; checks of health come every minute."""
_MARKS = {"RUNNING": "▶", "COMPLETED": "✓", "FAILED": "✗", "CRASHED": "✗", "SCHEDULED": "↻"}


def here(flow: Flow[..., Coroutine[Any, Any, Any]], **parameters: Any) -> int:
    """Run a flow in this process; return 0 if it completed, else a code of `exit_codes`.

    A signal ends it with 128 and its number, as a shell would say.

    Raises:
        InvalidInput, ServerLost, ServerRefuses: it could not begin.
    """
    end = Ending()
    former = signal.signal(signal.SIGTERM, lambda number, _: _interrupt(end, number))
    try:
        with served():
            code = asyncio.run(_here(flow, parameters, end))
        if flow.name in CHANGING:
            typer.echo(next_command(parameters, code), err=code != 0)
        return code
    except ServerLost as error:
        tell(LOST if end.state else error)
        code = _last_word(end.state, end) if end.state else _interrupted(end) or 1
        sys.stdout.flush()
        # At a normal exit Prefect offers each event of the run to the dead server, for minutes.
        os._exit(code)
    except (KeyboardInterrupt, asyncio.CancelledError, TerminationSignal):
        hint = "run it again"
        if flow.name in CHANGING:
            hint = f"`pd-deploy recover {parameters['file']}` repairs what the run left"
        tell(f"interrupted → {hint}")
        return _interrupted(end) or 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, former)


def next_command(parameters: Mapping[str, Any], code: int) -> str:
    """Name what is useful after a run: to see what serves, and after a failure of a generation its
    logs; a run that failed before it started one has none."""
    file = parameters["file"]
    if parameters.get("dry_run"):
        return f"Next: pd-deploy deploy {file}"
    if code == 0:
        return f"Next: pd-deploy status {file}"
    if code == FAILED:
        return f"Next: pd-deploy status {file} (what serves now)"
    return f"Next: pd-deploy status {file} (what serves now), pd-deploy logs {file} (why not)"


def _interrupt(end: Ending, number: int) -> NoReturn:
    end.signals.append(number)
    raise KeyboardInterrupt


def _interrupted(end: Ending) -> int:
    """Return the exit code after signals; 0 if none came."""
    return 128 + end.signals[0] if end.signals else 0


def follow(flow_run: UUID | None) -> int:
    """Print a run's steps as they happen; return 0 if it completed, else a code of `exit_codes`.

    Args:
        flow_run: by default, the latest run of pd-deploy's that has begun or is due.

    Raises:
        PdDeployError: there is none.
    """
    with served():
        return asyncio.run(_follow_latest() if flow_run is None else _follow(flow_run))


async def _follow_latest() -> int:
    due = FlowRunFilterExpectedStartTime(before_=DateTime.now(UTC))
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=FLOWS)),
            flow_run_filter=FlowRunFilter(expected_start_time=due),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    if not runs:
        raise PdDeployError(
            "expected a run of pd-deploy on the Prefect server, found none",
            hint="start one: `prefect deployment run`, or `pd-deploy deploy FILE`",
        )
    typer.echo(f"run {runs[0].name!r} ({runs[0].id})")
    return await _follow(runs[0].id)


async def _here(
    flow: Flow[..., Coroutine[Any, Any, Any]], parameters: dict[str, Any], end: Ending
) -> int:
    ending.set(end)
    state: State[Any] = await flow(**parameters, return_state=True)
    error = None if state.is_cancelled() else await state.aresult(raise_on_failure=False)
    if isinstance(error, InvalidInput):
        raise error
    if isinstance(error, PdDeployError):
        tell(error)
        return of_a_run(state.name or "")
    return _last_word(state, end)


async def _follow(flow_run: UUID) -> int:
    shown: set[tuple[UUID, UUID]] = set()
    quiet, printed, waiting = 0, "", Waiting()
    async with get_client() as client:
        while True:
            run = await client.read_flow_run(flow_run)
            quiet = 0 if _show(await _task_runs(client, flow_run), shown) else quiet + 1
            if (line := await waiting.line(client, run)) and line != printed:
                typer.echo(line)
                printed = line
            # The server records task runs a little later than the end of their flow run.
            if run.state and run.state.is_final() and quiet >= QUIET_POLLS:
                if "file" in run.parameters:
                    remember(Path(run.parameters["file"]))
                code = _last_word(await in_its_own_words(client, run.id, run.state))
                if "file" in run.parameters:
                    typer.echo(next_command(run.parameters, code), err=code != 0)
                return code
            await asyncio.sleep(POLL_INTERVAL_S)


async def in_its_own_words(client: PrefectClient, flow_run: UUID, last: State[Any]) -> State[Any]:
    """Return the state in which a run itself says how it ended: a worker that cancels it writes
    one of its own over that."""
    if not last.is_cancelled():
        return last
    states = await client.read_flow_run_states(flow_run)
    return min((s for s in states if s.is_cancelled()), key=lambda s: s.timestamp, default=last)


async def _task_runs(client: PrefectClient, flow_run: UUID) -> list[TaskRun]:
    """Read all task runs of a flow run, as many at a time as the server gives."""
    chosen, tasks = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])), list[TaskRun]()
    while True:
        page = await client.read_task_runs(flow_run_filter=chosen, limit=PAGE, offset=len(tasks))
        tasks += page
        if len(page) < PAGE:
            return tasks


class Waiting:
    """What a run waits for that has not begun, in words.

    A run passes through some states in a moment: a line comes when it stays in one.
    """

    def __init__(self) -> None:
        self._state: UUID | None = None
        self._polls = 0

    async def line(self, client: PrefectClient, run: FlowRun) -> str:
        """Say what the run waits for; nothing if it does not, or not for long yet."""
        state = run.state
        self._polls = self._polls + 1 if state and state.id == self._state else 0
        self._state = state.id if state else None
        if not state or state.is_final() or state.is_running() or self._polls < QUIET_POLLS:
            return ""
        ahead = await _ahead(client, run)
        return waits(run, state, ahead)


def waits(run: FlowRun, state: State[Any], ahead: str) -> str:
    """Write what a run waits for.

    Args:
        ahead: other runs of its deployment that are at work.
    """
    pool = run.work_pool_name or "its work pool"
    due = state.state_details.scheduled_time
    if ahead:
        why = f"for {ahead}"
    elif state.name == QUEUED:
        why = "for its turn: another run of its deployment has just ended, or is about to begin"
    elif state.is_pending():
        why = f"for the worker of pool {pool} that took it to start it"
    elif state.is_paused():
        why = "for somebody to resume it in the UI"
    elif state.name == "Scheduled" and due and due > datetime.now(UTC):
        why = f"until {due.astimezone():%Y-%m-%d %H:%M:%S}, when it is due"
    else:
        why = f"for a worker: none of pool {pool} takes it → `prefect worker start --pool {pool}`"
    return f"{state.name}: waits {why}"


async def _ahead(client: PrefectClient, run: FlowRun) -> str:
    """Name the runs that have a run's place: others of its deployment, or those of its queue."""
    same = DeploymentFilter(
        id=DeploymentFilterId(any_=[run.deployment_id] if run.deployment_id else [])
    )
    if others := await _at_work(client, run, deployment_filter=same):
        return f"{', '.join(others)}, which works on the same deployment"
    queue = await client.read_work_queue(run.work_queue_id) if run.work_queue_id else None
    if not queue or not queue.concurrency_limit:
        return ""
    chosen = WorkQueueFilter(id=WorkQueueFilterId(any_=[queue.id]))
    others = await _at_work(client, run, work_queue_filter=chosen)
    full = len(others) >= queue.concurrency_limit
    return f"{', '.join(others)}, which has the queue {queue.name}" if full else ""


async def _at_work(client: PrefectClient, run: FlowRun, **chosen: Any) -> list[str]:
    """Name the other runs of a filter that hold a slot."""
    active = FlowRunFilterState(
        type=FlowRunFilterStateType(
            any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
        )
    )
    runs = await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=active), **chosen)
    return [
        f"run {other.name!r} ({other.id}), {other.state_name}"
        for other in runs
        if other.id != run.id
    ]


def _show(tasks: Iterable[TaskRun], shown: set[tuple[UUID, UUID]]) -> bool:
    """Print what has changed since the last look, oldest first; tell whether anything has."""
    changed = [
        (task.state.timestamp, task)
        for task in tasks
        if task.state and (task.id, task.state.id) not in shown
    ]
    for when, task in sorted(changed, key=lambda pair: pair[0]):
        assert task.state is not None
        shown.add((task.id, task.state.id))
        if task.state.type.value in _MARKS:
            typer.echo(_line(when, task, task.state))
    return bool(changed)


def _line(when: datetime, task: TaskRun, state: State[object]) -> str:
    mark = _MARKS[state.type.value]
    line = f"{when.astimezone():%H:%M:%S} {mark} {task.name}"
    if state.is_completed():
        line += f"  {task.total_run_time.total_seconds():.1f} s"
    elif not state.is_running():
        line += f"  {state.name}: {state.message or 'will be tried again'}"
    return line


def _last_word(state: State[Any], end: Ending | None = None) -> int:
    typer.echo(f"{state.name}: {named(state.message)}", err=not state.is_completed())
    if state.is_completed():
        return 0
    return (_interrupted(end) if end else 0) or of_a_run(state.name or "")
