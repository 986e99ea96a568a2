"""Hosts that are away while a service is brought back: it waits for them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from prefect.logging import get_run_logger

from pd_deploy.errors import (
    HostAway,
    LeaseLost,
    PdDeployError,
    RegistryUnavailable,
    SeveralFaults,
    TransientError,
    faults_of,
    headline,
    is_transient,
)
from pd_deploy.hosts.host import Host

T = TypeVar("T")

POLL_S = 2.0


async def with_all_hosts(
    hosts: Mapping[str, Host], seconds: float, attempt: Callable[[], Awaitable[T]]
) -> T:
    """Make an attempt; make it again when it failed because hosts were away and they are back.

    Whatever fails while a host is away is put down to that: servers end when those of another host
    that they have links to are gone.

    Args:
        hosts: those that it needs.
        seconds: how long after the first such failure it is made again.
        attempt: it finds what an earlier one has done.

    Raises:
        HostAway: a host was not back in time.
        SeveralFaults: several hosts were not.
        Exception: as the attempt raises it, when no host is away.
    """
    deadline: float | None = None
    while True:
        connects = {name: host.connects for name, host in hosts.items()}
        try:
            return await attempt()
        except Exception as fault:
            if isinstance(fault, LeaseLost):
                raise
            away = await hosts_away(hosts)
            lost = any(host.connects > max(connects.get(n, 0), 1) for n, host in hosts.items())
            if not (away or lost or _is_of_the_way_there(fault)):
                raise
            deadline = time.monotonic() + seconds if deadline is None else deadline
            if not away and time.monotonic() >= deadline:
                raise
            get_run_logger().warning("%s; trying again", headline(fault))
            await _until_back(hosts, away, seconds, deadline)


async def _until_back(
    hosts: Mapping[str, Host], away: Mapping[str, TransientError], seconds: float, deadline: float
) -> None:
    logged = frozenset[str]()
    while True:
        if away.keys() != logged:
            logged = frozenset(away)
            for fault in away.values():
                remaining = max(deadline - time.monotonic(), 0)
                get_run_logger().warning(
                    "waiting for at most %.0f s (gates.away) for %s", remaining, headline(fault)
                )
        if away and time.monotonic() >= deadline:
            raise _not_back(hosts, away, seconds)
        await asyncio.sleep(POLL_S)
        if not (away := await hosts_away(hosts)):
            break
    if logged:
        get_run_logger().warning("all hosts are back; going on")


async def hosts_away(hosts: Mapping[str, Host]) -> dict[str, TransientError]:
    """Ask hosts that are needed, and their Docker engines, whether they are there."""

    async def fault_of(host: Host) -> TransientError | None:
        try:
            await host.docker.info()
        except TransientError as fault:
            return fault
        except PdDeployError:
            return None
        return None

    faults = await asyncio.gather(*map(fault_of, hosts.values()))
    return {name: fault for name, fault in zip(hosts, faults, strict=True) if fault}


def _is_of_the_way_there(fault: Exception) -> bool:
    """Tell whether hosts may have been away for a moment."""
    return any(
        is_transient(cause) and not isinstance(cause, RegistryUnavailable)
        for cause in faults_of(fault)
    )


def _not_back(
    hosts: Mapping[str, Host], away: Mapping[str, TransientError], seconds: float
) -> PdDeployError:
    faults = [
        HostAway(
            f"expected it to be back within {seconds:g} s (gates.away), found: {fault.message}",
            host=hosts[name].where,
            hint="look at its power, network and SSH server; when it is back, run "
            "`pd-deploy recover FILE`",
        )
        for name, fault in away.items()
    ]
    return faults[0] if len(faults) == 1 else SeveralFaults(faults)
