"""Leases on hosts in memory: what a real host shows only by chance."""

import asyncio
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest

from pd_deploy.errors import ConnectionDropped, LeaseHeld, LeaseLost
from pd_deploy.hosts.lease import Lease, Owner
from tests.memory.calls import Calls, Moment
from tests.memory.clock import Clock, VirtualLoop
from tests.memory.commands import lease_lines
from tests.memory.host import MemoryHost
from tests.memory.machine import Cluster

ROOT = "/var/lib/pd-deploy/leased"
WHO = Owner(deployment="leased", run="a run", machine="elsewhere", pid=1, started="1")


@pytest.fixture
def hosts() -> dict[str, MemoryHost]:
    cluster = Cluster(Clock(), {"a": "10.0.0.1", "b": "10.0.0.2"})
    return {m.name: MemoryHost(m.name, m, Calls()) for m in cluster.machines.values()}


def run(hosts: dict[str, MemoryHost], work: Callable[[], Awaitable[None]]) -> None:
    clock = hosts["a"].machine.clock
    loop = VirtualLoop(clock)

    async def all_of_it() -> None:
        await work()
        for host in hosts.values():
            await host.aclose()

    try:
        with mock.patch("time.monotonic", clock.seconds):
            loop.run_until_complete(all_of_it())
    finally:
        loop.close()


async def take(lease: Lease, *hosts: MemoryHost, wait: float = 0) -> None:
    await lease.take([(host, lease.owner) for host in hosts], wait)


def test_a_slow_host_lets_no_other_hosts_lease_expire(hosts: dict[str, MemoryHost]) -> None:
    async def work() -> None:
        first, second = Lease(ROOT, WHO, 4), Lease(ROOT, WHO, 4)
        async with first.held(hosts):
            await take(first, *hosts.values())
            hosts["b"].machine.answers_after = 50
            with pytest.raises(LeaseHeld):
                await take(second, hosts["a"], wait=30)
            await first.check(hosts["a"])

    run(hosts, work)


def test_a_clock_that_is_set_makes_nobody_wait_longer_than_a_lease_lasts(
    hosts: dict[str, MemoryHost],
) -> None:
    """And lets nobody in before."""

    async def work() -> None:
        clock = hosts["a"].machine.clock
        for step in (-525, 525):
            first, second = Lease(ROOT, WHO, 4), Lease(ROOT, WHO, 4)
            await take(first, hosts["a"])
            clock.step(step)
            with pytest.raises(LeaseHeld, match="renewed 0 s ago"):
                await take(second, hosts["a"])
            await take(second, hosts["a"], wait=6)
            await second.release(hosts)

    run(hosts, work)


@pytest.mark.parametrize("after", [False, True])
def test_a_cancelled_taking_leaves_no_lease_behind(
    hosts: dict[str, MemoryHost], after: bool
) -> None:
    """Whether the host had written it already or not."""

    async def work() -> None:
        lease = Lease(ROOT, WHO, 30)

        async def hold() -> None:
            async with lease.held(hosts):
                await take(lease, *hosts.values())

        holding = asyncio.ensure_future(hold())

        def cancel(moment: Moment) -> None:
            if moment.what == "lease take" and moment.after == after:
                holding.cancel()

        hosts["b"].calls.watch = cancel
        with pytest.raises(asyncio.CancelledError):
            await holding
        for host in hosts.values():
            assert lease_lines(host.machine, ROOT)[1] == ""

    run(hosts, work)


def test_a_deleted_lease_is_told_as_that(hosts: dict[str, MemoryHost]) -> None:
    async def work() -> None:
        lease, told = Lease(ROOT, WHO, 4), list[str]()
        lease.watchers.append(told.append)
        async with lease.held(hosts):
            await take(lease, *hosts.values())
            hosts["b"].machine.disk.remove(f"{ROOT}/lease")
            await asyncio.sleep(2)
            assert "host b" in told[0]
            assert lease.lost
            assert not lease.lost.is_overtaken
            assert "somebody deleted the file" in told[0]
            with pytest.raises(LeaseLost):
                await lease.check(hosts["a"])

    run(hosts, work)


def test_a_host_out_of_reach_loses_no_lease(hosts: dict[str, MemoryHost]) -> None:
    async def work() -> None:
        lease = Lease(ROOT, WHO, 4)
        async with lease.held(hosts):
            await take(lease, *hosts.values())

            def cut(moment: Moment) -> None:
                raise ConnectionDropped("cut", host=moment.host)

            hosts["b"].calls.watch = cut
            await asyncio.sleep(20)
            hosts["b"].calls.watch = lambda _: None
            await asyncio.sleep(2)
            await lease.check(hosts["b"])

    run(hosts, work)
