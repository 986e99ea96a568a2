"""Stopping a container, and telling which requests that has cut."""

import asyncio
import contextlib
from collections.abc import Callable

from pd_deploy.errors import ContainerMissing, PdDeployError
from pd_deploy.hosts.concurrent import task_group
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations
from pd_deploy.steps.session import LockedSession

TELL_EVERY_S = 5.0
LOOK_BEFORE_S = 2.0
"""How long before its time is up a proxy's connections are first counted: most end before."""
POLL_S = 0.5
KILLED = 137
"""The exit code of a container that was still there when its time was up."""


async def stop(
    session: LockedSession,
    host: Host,
    state: ContainerState,
    timeout: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> int:
    """Stop a container of the deployment.

    Args:
        timeout: seconds after which it is killed; by default `container.stop_timeout`, and of a
            proxy `proxy.drain`, if the file has that.
        tell: told how many requests are under way while a proxy stops.

    Returns:
        How many requests of clients it has cut: their connections were open when its time was up.
    """
    is_proxy = state.labels.get(generations.ROLE) == "proxy"
    if timeout is None:
        of = session.deployment
        timeout = of.drain if is_proxy else of.container.stop_timeout
    deployment = session.deployment.name
    await session.may_change(host)
    async with task_group() as group:
        clients = _Clients(host, state)
        counting = group.create_task(clients.count(timeout, tell)) if is_proxy else None
        try:
            await host.docker.stop(state.id, deployment=deployment, timeout=timeout)
        finally:
            if counting:
                counting.cancel()
    return clients.connected if clients.connected and await _was_killed(host, state) else 0


def told_of(requests: int, session: LockedSession) -> str:
    """Tell how many requests a stop has cut; "" for none."""
    if not requests:
        return ""
    what = f"{requests} requests that were" if requests > 1 else "1 request that was"
    deployment = session.deployment
    given = deployment.first_proxy.drain
    key = "proxy.drain" if given is not None else "container.stop_timeout"
    return f"cut {what} not answered within {deployment.drain} s ({key})"


class _Clients:
    """Those who are connected to a proxy while it stops."""

    def __init__(self, host: Host, state: ContainerState) -> None:
        self.connected = 0
        self._host = host
        self._container = state.id
        self._port = int(state.labels.get(generations.PORTS, "").partition(",")[0] or 0)

    async def count(self, seconds: float, tell: Callable[[str], None] | None) -> None:
        """Count them again and again, until the proxy is killed after some seconds."""
        if not self._port:
            return
        now = asyncio.get_running_loop().time
        killed_at = now() + seconds
        told = 0
        while (left := killed_at - now() - LOOK_BEFORE_S) > 0:
            await asyncio.sleep(min(left, TELL_EVERY_S))
            if tell and left > TELL_EVERY_S:
                with contextlib.suppress(PdDeployError):
                    under_way = await self._look()
                    if under_way != told:
                        tell(_still(under_way, killed_at - now()))
                    told = under_way
        while True:
            # The stop goes on, counted or not.
            with contextlib.suppress(PdDeployError):
                connected = await self._look()
                # A later count would miss those that were cut by then.
                if now() < killed_at:
                    self.connected = connected
            await asyncio.sleep(POLL_S)

    async def _look(self) -> int:
        """Count the connections of the proxy itself: others may have its port by now."""
        pids = await self._host.facts.connections(self._port)
        homes = await self._host.facts.containers_of(sorted(set(pids)))
        return sum(homes.get(pid) == self._container for pid in pids)


def _still(requests: int, seconds: float) -> str:
    what = "1 request is" if requests == 1 else f"{requests} requests are"
    return f"{what} still being answered; the proxy stops in {seconds:.0f} s at the latest"


async def _was_killed(host: Host, state: ContainerState) -> bool:
    try:
        return (await host.docker.inspect(state.id)).exit_code == KILLED
    except ContainerMissing:
        return True
