"""Running the flow here, and following a run elsewhere."""

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterable
from datetime import datetime
from typing import Any, NoReturn
from uuid import UUID

import typer
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.exceptions import TerminationSignal

from pd_deploy.cli.prefect_api import ServerLost, served
from pd_deploy.errors import PdDeployError
from pd_deploy.flows.interrupts import Ending, ending

POLL_INTERVAL_S = 0.5
MAX_TASKS = 200
QUIET_POLLS = 4
LOST = "the Prefect server was lost during the run, and does not know how it ended"
QUEUED = "AwaitingConcurrencySlot"
_MARKS = {"RUNNING": "▶", "COMPLETED": "✓", "FAILED": "✗", "CRASHED": "✗", "SCHEDULED": "↻"}


def here(flow: Flow[..., Coroutine[Any, Any, Any]], **parameters: Any) -> int:
    """Run a flow in this process; return 0 if it completed, 1 if it failed.

    A signal ends it with 128 and its number, as a shell would say.

    Raises:
        PdDeployError: what it failed of.
    """
    end = Ending()
    former = signal.signal(signal.SIGTERM, lambda number, _: _interrupt(end, number))
    try:
        with served():
            return asyncio.run(_here(flow, parameters, end))
    except ServerLost as error:
        typer.echo(f"pd-deploy: {LOST if end.state else error}", err=True)
        code = _last_word(end.state, end) if end.state else _interrupted(end) or 1
        sys.stdout.flush()
        # At a normal exit Prefect offers each event of the run to the dead server, for minutes.
        os._exit(code)
    except (KeyboardInterrupt, asyncio.CancelledError, TerminationSignal):
        hint = f"`pd-deploy recover {parameters['file']}` repairs what the run left"
        typer.echo(f"pd-deploy: interrupted → {hint}", err=True)
        return _interrupted(end) or 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, former)


def _interrupt(end: Ending, number: int) -> NoReturn:
    end.signals.append(number)
    raise KeyboardInterrupt


def _interrupted(end: Ending) -> int:
    """Return the exit code after signals; 0 if none came."""
    return 128 + end.signals[0] if end.signals else 0


def follow(flow_run: UUID) -> int:
    """Print a run's steps as they happen; return 0 if it completed, 1 otherwise."""
    with served():
        return asyncio.run(_follow(flow_run))


async def _here(
    flow: Flow[..., Coroutine[Any, Any, Any]], parameters: dict[str, Any], end: Ending
) -> int:
    ending.set(end)
    state: State[Any] = await flow(**parameters, return_state=True)
    error = None if state.is_cancelled() else await state.aresult(raise_on_failure=False)
    if isinstance(error, PdDeployError):
        raise error
    return _last_word(state, end)


async def _follow(flow_run: UUID) -> int:
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    shown: set[tuple[UUID, UUID]] = set()
    quiet, ahead = 0, ""
    async with get_client() as client:
        while True:
            run = await client.read_flow_run(flow_run)
            tasks = await client.read_task_runs(flow_run_filter=chosen, limit=MAX_TASKS)
            quiet = 0 if _show(tasks, shown) else quiet + 1
            if run.state and run.state.name == QUEUED and (now := await _ahead(client, run)):
                if now != ahead:
                    typer.echo(f"waits for {now}, which works on the same deployment")
                ahead = now
            # The server records task runs a little later than the end of their flow run.
            if run.state and run.state.is_final() and quiet >= QUIET_POLLS:
                return _last_word(run.state)
            await asyncio.sleep(POLL_INTERVAL_S)


async def _ahead(client: PrefectClient, run: FlowRun) -> str:
    """Describe the runs for which this one has to wait in Prefect's queue."""
    same = DeploymentFilter(
        id=DeploymentFilterId(any_=[run.deployment_id] if run.deployment_id else [])
    )
    active = FlowRunFilterState(
        type=FlowRunFilterStateType(
            any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
        )
    )
    runs = await client.read_flow_runs(
        deployment_filter=same, flow_run_filter=FlowRunFilter(state=active)
    )
    return ", ".join(f"run {one.name!r} ({one.id}), {one.state_name}" for one in runs)


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
    typer.echo(f"{state.name}: {state.message}", err=not state.is_completed())
    if state.is_completed():
        return 0
    return (_interrupted(end) if end else 0) or 1
