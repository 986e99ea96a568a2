"""Telling the Prefect server about runs whose process is gone."""

import asyncio
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Crashed

from pd_deploy.hosts.lease import Owner

PATIENCE_S = 20  # for the Prefect server; the hosts stay locked meanwhile


async def bury(owner: Owner, taker: str) -> None:
    """Mark a run whose lease expired as crashed, if its server still shows it as running.

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
    except (ObjectNotFound, ValueError):
        pass  # a run by command on another machine, with a server of its own
    except Exception as fault:
        get_run_logger().warning(
            "%s is dead, but the Prefect server could not be told: %s", owner.run, fault
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
