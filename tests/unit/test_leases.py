"""Leases on hosts in memory: what a real host shows only by chance."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest

from pd_deploy.errors import ConnectionDropped, LeaseHeld, LeaseLost
from pd_deploy.hosts.lease import Lease, Owner
from pd_deploy.hosts.processes import machine
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
    clock = next(iter(hosts.values())).machine.clock
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


def many_hosts(count: int) -> dict[str, MemoryHost]:
    addresses = {f"h{number:02}": f"10.0.0.{10 + number}" for number in range(count)}
    cluster = Cluster(Clock(), addresses)
    return {m.name: MemoryHost(m.name, m, Calls()) for m in cluster.machines.values()}


def asked(hosts: dict[str, MemoryHost]) -> int:
    """Count how often they were asked for their leases."""
    moments = [moment for host in hosts.values() for moment in host.calls.moments]
    return sum(moment.what == "lease take" and not moment.after for moment in moments)


@pytest.mark.parametrize("crashed", [False, True])
def test_many_hosts_take_no_longer_than_two(crashed: bool) -> None:
    """Also after a run that has crashed, and left its leases on all of them."""
    hosts = many_hosts(24)
    gone = WHO.model_copy(update={"machine": machine(), "pid": 2**22 + 1, "started": "1"})

    async def work() -> None:
        if crashed:
            await take(Lease(ROOT, gone, 600), *hosts.values())
        clock, before = hosts["h00"].machine.clock, asked(hosts)
        for host in hosts.values():
            host.machine.answers_after = 1
        begin, lease = clock.seconds(), Lease(ROOT, WHO, 600)
        await take(lease, *hosts.values())
        assert len(lease.numbers) == 24
        assert clock.seconds() - begin == (3 if crashed else 2)
        assert asked(hosts) - before == (25 if crashed else 24)

    run(hosts, work)


@pytest.mark.parametrize("slow", ["h01", "h02", "h03"])
def test_runs_on_other_hosts_never_wait_for_each_other(slow: str) -> None:
    """Not even where each gets what the other needs first, and no host is the first of all."""
    hosts = many_hosts(4)
    hosts[slow].machine.answers_after = 0.2
    sets = [["h00", "h01", "h02", "h03"], ["h02", "h01", "h03"], ["h03", "h02"], ["h03", "h01"]]
    worked: list[int] = []

    async def one(number: int) -> None:
        mine, lease = {name: hosts[name] for name in sets[number]}, Lease(ROOT, WHO, 600)
        async with lease.held(mine):
            await take(lease, *mine.values(), wait=60)
            for host in mine.values():
                await lease.check(host)
            await asyncio.sleep(1)
            for host in mine.values():
                await lease.check(host)
            worked.append(number)

    async def work() -> None:
        for order in itertools.permutations(range(len(sets))):
            await asyncio.gather(*map(one, order))
        assert len(worked) == 24 * len(sets)
        for host in hosts.values():
            assert lease_lines(host.machine, ROOT)[1] == ""

    run(hosts, work)


def test_who_waits_holds_nothing_that_comes_later() -> None:
    hosts = many_hosts(4)

    async def work() -> None:
        first, second = Lease(ROOT, WHO, 600), Lease(ROOT, WHO, 600)
        await take(first, hosts["h01"])
        with pytest.raises(LeaseHeld, match="h01"):
            await take(second, *hosts.values())
        assert [*second.numbers] == [hosts["h00"].address]
        third = Lease(ROOT, WHO, 600)
        await take(third, hosts["h02"], hosts["h03"])

    run(hosts, work)
