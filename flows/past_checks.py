"""Checks that are over, as their Prefect server lists them: what the last one said, and keeping the
list short. No check depends on it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from pd_deploy.flows.outcomes import NOTHING_SERVES

T = TypeVar("T")

KEPT = 20
"""Finished checks that stay listed; those that restarted something, or failed, all do."""
AT_ONCE = 50
PATIENCE_S = 10
TROUBLED = frozenset({"Degraded", "Down", NOTHING_SERVES})
"""Names of the last states of checks that told of trouble."""
MENDED = "Mended"


async def was_told() -> bool:
    """Tell whether the check before found trouble, so that this trouble has been told."""

    async def ask(client: PrefectClient) -> bool:
        ended = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED]
        return any(is_troubled(run.state) for run in await _runs(client, ended, limit=1))

    return bool(await _patiently(ask, "what the check before said is not known"))


def is_troubled(state: State | None) -> bool:
    """Tell whether the last state of a check says that it told of trouble."""
    return state is not None and state.name in TROUBLED


async def forget() -> None:
    """Delete the oldest finished checks from the list."""

    async def delete(client: PrefectClient) -> None:
        over = [StateType.COMPLETED, StateType.CANCELLED]
        for run in await _runs(client, over, limit=AT_ONCE, offset=KEPT):
            if run.state and run.state.name != MENDED:
                await client.delete_flow_run(run.id)

    await _patiently(delete, "old checks stay listed")


async def _patiently(ask: Callable[[PrefectClient], Awaitable[T]], otherwise: str) -> T | None:
    """Ask the server for at most `PATIENCE_S`; log what follows if it does not answer."""
    try:
        async with asyncio.timeout(PATIENCE_S), get_client() as client:
            return await ask(client)
    except Exception as fault:
        get_run_logger().warning("%s: %s", otherwise, str(fault) or type(fault).__name__)
        return None


async def _runs(
    client: PrefectClient, ended: list[StateType], *, limit: int, offset: int = 0
) -> list[FlowRun]:
    """List runs of this run's own deployment, the latest first; none for a run by command."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run is None or flow_run.deployment_id is None:
        return []
    return await client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[flow_run.deployment_id])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ended))
        ),
        sort=FlowRunSort.END_TIME_DESC,
        limit=limit,
        offset=offset,
    )
