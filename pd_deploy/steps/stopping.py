"""Stopping a container, and telling which requests that has cut."""

import asyncio
import contextlib

from pd_deploy.errors import ContainerMissing, PdDeployError
from pd_deploy.hosts.concurrent import task_group
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations
from pd_deploy.steps.session import LockedSession

LOOK_BEFORE_S = 2.0
"""How long before its time is up a proxy's connections are first counted: most end before."""
POLL_S = 0.5
KILLED = 137
"""The exit code of a container that was still there when its time was up."""


async def stop(
    session: LockedSession, host: Host, state: ContainerState, timeout: int | None = None
) -> int:
    """Stop a container of the deployment.

    Args:
        timeout: seconds after which it is killed; by default `container.stop_timeout`.

    Returns:
        How many requests of clients it has cut: their connections were open when its time was up.
    """
    seconds = session.deployment.container.stop_timeout if timeout is None else timeout
    deployment = session.deployment.name
    await session.may_change(host)
    is_proxy = state.labels.get(generations.ROLE) == "proxy"
    async with task_group() as group:
        clients = _Clients(host, state)
        counting = group.create_task(clients.count(seconds)) if is_proxy else None
        try:
            await host.docker.stop(state.id, deployment=deployment, timeout=seconds)
        finally:
            if counting:
                counting.cancel()
    return clients.connected if clients.connected and await _was_killed(host, state) else 0


def told_of(requests: int, session: LockedSession) -> str:
    """Tell how many requests a stop has cut; "" for none."""
    if not requests:
        return ""
    what = f"{requests} requests that were" if requests > 1 else "1 request that was"
    seconds = session.deployment.container.stop_timeout
    return f"cut {what} not answered within {seconds} s (container.stop_timeout)"


class _Clients:
    """Those who are connected to a proxy while it stops."""

    def __init__(self, host: Host, state: ContainerState) -> None:
        self.connected = 0
        self._host = host
        self._port = int(state.labels.get(generations.PORTS, "").partition(",")[0] or 0)

    async def count(self, seconds: float) -> None:
        """Count them again and again, until the proxy is killed after some seconds."""
        if not self._port:
            return
        killed_at = asyncio.get_running_loop().time() + seconds
        await asyncio.sleep(max(seconds - LOOK_BEFORE_S, 0))
        while True:
            # The stop goes on, counted or not.
            with contextlib.suppress(PdDeployError):
                connected = await self._host.facts.connections(self._port)
                # A later count would miss those that were cut by then.
                if asyncio.get_running_loop().time() < killed_at:
                    self.connected = connected
            await asyncio.sleep(POLL_S)


async def _was_killed(host: Host, state: ContainerState) -> bool:
    try:
        return (await host.docker.inspect(state.id)).exit_code == KILLED
    except ContainerMissing:
        return True
