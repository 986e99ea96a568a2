"""Telling the Prefect server about runs whose process is gone, and writing their reports."""

import asyncio
from collections.abc import Sequence
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import TaskRunSort
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Crashed

from pd_deploy.hosts.lease import Owner

PATIENCE_S = 20  # for the Prefect server; the hosts stay locked meanwhile


async def bury(owner: Owner, taker: str) -> None:
    """Mark a run whose lease expired as crashed, if its server still shows it as running, and write
    its report, if it has none.

    Otherwise the runs queued behind it wait for minutes, until Prefect notices. Errors are only
    logged, because the hosts do not depend on it.

    Args:
        owner: whose lease it was.
        taker: the run that has the lease now.
    """
    message = f"Its process is gone: it stopped renewing its lease, and {taker} took the lease over"
    try:
        async with asyncio.timeout(PATIENCE_S), get_client() as client:
            run = await client.read_flow_run(UUID(owner.flow_run))
            if run.state and not run.state.is_final():
                await client.set_flow_run_state(run.id, Crashed(message=message))
                get_run_logger().info("%s is dead; it is now marked as Crashed", owner.run)
            await _report(client, owner, run, message)
    except (ObjectNotFound, ValueError):
        pass  # a run by command on another machine, with a server of its own
    except Exception as fault:
        get_run_logger().warning(
            "%s is dead, but the Prefect server could not be told: %s", owner.run, fault
        )


async def _report(client: PrefectClient, owner: Owner, run: FlowRun, message: str) -> None:
    key = f"{owner.deployment}-report"
    written = ArtifactFilter(
        key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])
    )
    if await client.read_artifacts(artifact_filter=written):
        return
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    latest = TaskRunSort.EXPECTED_START_TIME_DESC  # a server gives 200 at most
    steps = await client.read_task_runs(flow_run_filter=of_run, sort=latest)
    await client.create_artifact(
        ArtifactCreate(
            key=key,
            type="markdown",
            data=report(owner, run, message, steps),
            description=f"Last run of {run.parameters.get('file')}",
            flow_run_id=run.id,
        )
    )


def report(owner: Owner, run: FlowRun, message: str, steps: Sequence[TaskRun]) -> str:
    """Write the report of a dead run from what the Prefect server knows of its steps. Pure."""
    began = sorted(
        (step.start_time, step.name, step.state_name or "", step.estimated_run_time)
        for step in steps
        if step.start_time
    )
    rows = [
        f"| {when:%H:%M:%S} | {name} | {'under way' if word == 'Running' else word.lower()} "
        f"| {'' if word == 'Running' else f'{time.total_seconds():.1f} s'} |"
        for when, name, word, time in began
    ]
    file = run.parameters.get("file", "FILE")
    return "\n".join(
        [
            f"# {owner.deployment}",
            "",
            f"**Crashed:** {message}.",
            "",
            "What it had begun, as far as it told the Prefect server; of its last second that may "
            "be less than it did. Times are UTC.",
            "",
            "| began | step | became | took |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Next: `pd-deploy status {file}` shows what serves. The run that took the lease over "
            f"goes on from what this one left; if it fails, `pd-deploy recover {file}` repairs it.",
            "",
            f"By {owner.run}.",
        ]
    )


async def untouched(resource: str) -> str:
    """Say why a run can't have changed a host; return "" if it may have, or that is unknown.

    Args:
        resource: the run as events name it, `prefect.flow-run.ID`.
    """
    try:
        async with asyncio.timeout(PATIENCE_S), get_client() as client:
            return why_untouched(await client.read_flow_run(UUID(resource.rpartition(".")[2])))
    except Exception as fault:
        get_run_logger().warning("what became of %s is not known: %s", resource, fault)
        return ""


def why_untouched(run: FlowRun) -> str:
    """Say why a run can't have changed a host; see `untouched`."""
    if not run.run_count:
        return f"run {run.name!r} never started"
    if run.parameters.get("dry_run"):
        return f"run {run.name!r} was a dry run"
    return ""
