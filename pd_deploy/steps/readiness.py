"""Asking an instance whether it is ready."""

import asyncio
import itertools
import time
from collections.abc import Callable

import httpx

from pd_deploy.errors import PdDeployError, TransientError
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.host import Host
from pd_deploy.steps import containers
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout

POLL_INTERVAL_S = 0.25
POLL_SHARE = 0.01
"""How much later than it happens a server's readiness is noticed, as a share of how long that took;
at least `POLL_INTERVAL_S`. 48 servers that load for minutes are asked a few times a second."""
PROBE_TIMEOUT_S = 5.0  # a server that compiles graphs answers slowly
PATIENCE_S = 5.0
"""How long a host may be away before the step says so and is retried."""
ALL_STARTED = "all servers started"
"""The gate from which on the time for loading counts; one for all, as each would wait for all."""


PROGRESS_S = (15.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""After how long its last line is told again; the last for good. So a load of half an hour takes
ten lines of a run's log for each server, and a short one none."""
LONGEST = 160  # characters of a server's line


async def until_ready(
    rollout: Rollout, instance: str, tell: Callable[[str], object] = lambda _: None
) -> Report:
    """Wait until an instance answers on its health endpoint.

    The wait ends at once when its container ends, or when another step fails. Its time counts from
    when all servers have started: none is ready before those that it links to.

    Args:
        tell: is told now and then how far the server says it is.

    Raises:
        InstanceDied: the server ended while loading; with the last lines of its log.
        NotReady: the time is over.
        Abandoned: another step failed.
    """
    session = rollout.session
    await session.barrier.unless_failed(_answers_or_ends(rollout, instance, tell))
    return Report("ready", instance, session.topology.host_of(instance), False, "healthy")


async def _answers_or_ends(rollout: Rollout, instance: str, tell: Callable[[str], object]) -> None:
    host, state = rollout.session.host_of(instance), await containers.require(rollout, instance)
    limit = rollout.session.deployment.gates.ready
    ended = asyncio.ensure_future(host.docker.wait(state.id, patience=PATIENCE_S))
    healthy = asyncio.ensure_future(_healthy(rollout, instance))
    over = asyncio.ensure_future(_time_is_up(rollout, limit))
    waits = (ended, healthy, over)
    telling = asyncio.ensure_future(_tell_progress(rollout, instance, tell))
    try:
        finished, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in (*waits, telling):
            wait.cancel()
    if ended in finished:
        ended.result()
        raise await containers.died(rollout, instance)
    if healthy not in finished:
        over.result()
        raise await containers.not_ready(
            rollout,
            instance,
            f"expected an answer on its health endpoint within {limit:g} s, found none",
            hint="raise gates.ready if it just needs more time",
        )
    healthy.result()


async def _tell_progress(rollout: Rollout, instance: str, tell: Callable[[str], object]) -> None:
    """Tell what a server that loads says last, whenever that is another line."""
    began, told = time.monotonic(), ""
    for pause in itertools.chain(PROGRESS_S, itertools.repeat(PROGRESS_S[-1])):
        await asyncio.sleep(pause)
        try:
            line = await containers.last_line(rollout, instance)
        except PdDeployError:
            continue  # whoever waits for the server sees what is wrong
        if line and line != told:
            told = line
            tell(f"not ready after {time.monotonic() - began:.0f} s: {line[:LONGEST]}")


async def _time_is_up(rollout: Rollout, seconds: float) -> None:
    await rollout.session.barrier.passed([ALL_STARTED])
    await asyncio.sleep(seconds)


async def _healthy(rollout: Rollout, instance: str) -> None:
    """Wait until all API servers of an instance answer 200 on /health. One without any is ready
    when its pod's master is."""
    pod = rollout.session.topology.pod_of(instance)
    member = rollout.session.topology.instance(instance)
    answering = member if member and member.api_ports else pod.master
    host = rollout.session.host_of(answering.name)
    await together(_server_healthy(host, answering.address, port) for port in answering.api_ports)


async def _server_healthy(host: Host, address: str, port: int) -> None:
    begin = time.monotonic()
    async with host.http(address, port) as client:
        while not await _answers(client, f"http://{address}:{port}/health"):
            waited = time.monotonic() - begin
            await asyncio.sleep(max(POLL_INTERVAL_S, waited * POLL_SHARE))


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url, timeout=PROBE_TIMEOUT_S)).status_code == 200
    except (httpx.HTTPError, TransientError):
        return False
