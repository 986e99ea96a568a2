"""Leases on real hosts: one run at a time, and what happens to one that is overtaken."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pd_deploy.errors import HostError, LeaseHeld, LeaseLost
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.lease import Lease, Owner, this_process
from pd_deploy.hosts.login import Login
from pd_deploy.lab import Lab, LabHost

ROOT = "/var/lib/pd-deploy/leased"
ELSEWHERE: dict[str, Any] = {"machine": "elsewhere boot pid", "pid": 1, "started": "1"}


@pytest.fixture
def box(lab: Lab) -> LabHost:
    box = lab.hosts["a"]
    box.run(["rm", "-rf", ROOT, "/var/lib/pd-deploy/other"])
    return box


@pytest.fixture
async def hosts(lab: Lab, box: LabHost) -> AsyncIterator[dict[str, Host]]:
    known, key = lab.known_hosts.read_text(), lab.ssh_key.read_text()
    login = Login("root", private_key=key, known_hosts=known)
    made = {name: Host(name, one.address, login) for name, one in lab.hosts.items()}
    made["user"] = Host("user", box.address, Login("deployer", private_key=key, known_hosts=known))
    yield made
    for host in made.values():
        await host.aclose()
    for one in lab.hosts.values():
        one.run(["rm", "-rf", ROOT, "/var/lib/pd-deploy/other"])


def lease(run: str, *, root: str = ROOT, lasts: float = 30, **owner: Any) -> Lease:
    """A lease of a run, of which nothing tells that it is dead unless said otherwise."""
    who = Owner(deployment="leased", run=run, **{**ELSEWHERE, **owner})
    return Lease(root, who, lasts)


async def take(one: Lease, *hosts: Host, wait: float = 0) -> None:
    await one.take([(host, one.owner) for host in hosts], wait)


async def test_taken_checked_and_given_back(box: LabHost, hosts: dict[str, Host]) -> None:
    """Its number counts up with every taking, and nothing else is left in the directory."""
    for number in (1, 2):
        one = lease("first")
        await take(one, hosts["a"])
        assert one.numbers == {box.address: number}
        await one.check(hosts["a"])
        await one.release(hosts)
        with pytest.raises(LeaseLost):
            await one.check(hosts["a"])
    assert box.run(["ls", "-A", ROOT]).stdout.split() == [".lease.lock", "lease"]


async def test_held_is_told_with_owner_and_age(hosts: dict[str, Host]) -> None:
    """And how long until a dead one is given up."""
    first, told = lease("run 'first' (http://ui/1)"), []
    await take(first, hosts["a"])
    second = lease("second")
    with pytest.raises(LeaseHeld) as caught:
        await second.take([(hosts["a"], second.owner)], 0.2, told.append)
    expected = r"run 'first' \(http://ui/1\) works on leased \(renewed \d+ s ago, from elsewhere\)"
    caught.match(expected)
    caught.match("given up after 30 s")
    assert len(told) == 1
    await first.check(hosts["a"])


async def test_the_next_run_goes_on_when_the_lease_is_given_back(hosts: dict[str, Host]) -> None:
    first, second = lease("first"), lease("second")
    await take(first, hosts["a"])
    waiting = asyncio.ensure_future(take(second, hosts["a"], wait=30))
    await first.release(hosts)
    await waiting
    await second.check(hosts["a"])


async def test_not_renewed_for_long_is_taken_over_by_the_hosts_own_clock(
    box: LabHost, hosts: dict[str, Host]
) -> None:
    """The one that was overtaken learns of it before its next change."""
    first, second = lease("first", lasts=600), lease("second", lasts=600)
    await take(first, hosts["a"])
    box.run(["sh", "-c", f"touch -d @$(($(date +%s) - 590)) {ROOT}/lease"])
    with pytest.raises(LeaseHeld):
        await take(second, hosts["a"])
    box.run(["sh", "-c", f"touch -d @$(($(date +%s) - 610)) {ROOT}/lease"])
    await take(second, hosts["a"])
    with pytest.raises(LeaseLost, match="found that of second"):
        await first.check(hosts["a"])


async def test_owner_that_is_provably_dead_is_taken_over_at_once(hosts: dict[str, Host]) -> None:
    """It was on this machine, in this boot, and its process has ended."""
    child = await asyncio.create_subprocess_exec("true")
    await child.wait()
    mine = this_process()
    dead = lease("dead", **{**mine, "pid": child.pid})
    await take(dead, hosts["a"])
    await take(lease("next"), hosts["a"])
    alive = lease("alive", **mine)
    with pytest.raises(LeaseHeld):
        await take(alive, hosts["a"])
    assert mine["pid"] == os.getpid()


@asynccontextmanager
async def renewed(one: Lease, hosts: dict[str, Host]) -> AsyncIterator[list[str]]:
    lost: list[str] = []
    one.watchers.append(lost.append)
    async with one.held(hosts):
        yield lost


async def test_renewed_while_the_run_works_and_given_back_at_its_end(
    hosts: dict[str, Host],
) -> None:
    """Longer than it would last without."""
    first, second = lease("first", lasts=2), lease("second", lasts=2)
    async with renewed(first, hosts) as lost:
        await take(first, hosts["a"])
        begin = time.monotonic()
        with pytest.raises(LeaseHeld):
            await take(second, hosts["a"], wait=3.5)
        assert time.monotonic() - begin > 3
        assert lost == []
    await take(second, hosts["a"])


async def test_renewal_tells_at_once_that_the_lease_is_lost(
    box: LabHost, hosts: dict[str, Host]
) -> None:
    """All that waits for something can give up then."""
    first = lease("first", lasts=1)
    async with renewed(first, hosts) as lost:
        await take(first, hosts["a"])
        box.run(["sh", "-c", f"printf '9\\nother\\n{{}}\\n' >{ROOT}/lease"])
        while not lost:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert "expected this run's lease" in lost[0]
    assert box.run(["sed", "-n", "2p", f"{ROOT}/lease"]).stdout.strip() == "other"


async def test_other_deployments_leases_are_reported(hosts: dict[str, Host]) -> None:
    """With what they are going to use, so that nothing is used twice."""
    other = lease("other", root="/var/lib/pd-deploy/other", ports=(9000,), devices=(0, 1))
    await take(other, hosts["a"])
    mine = lease("mine")
    await take(mine, hosts["a"])
    (found,) = mine.others[hosts["a"].address]
    assert found.owner == other.owner
    await other.release(hosts)
    await mine.release(hosts)
    again = lease("again")
    await take(again, hosts["a"])
    assert again.others[hosts["a"].address] == []


async def test_two_runs_on_two_hosts_never_wait_for_each_other(hosts: dict[str, Host]) -> None:
    """Both take them in the same order, whatever theirs was."""
    first, second = lease("first"), lease("second")

    async def work(one: Lease, *order: Host) -> None:
        await take(one, *order, wait=30)
        await one.release(hosts)

    await asyncio.gather(work(first, hosts["a"], hosts["b"]), work(second, hosts["b"], hosts["a"]))


async def test_user_without_a_directory_is_told_which_key_to_set(hosts: dict[str, Host]) -> None:
    with pytest.raises(HostError, match=r"(?s)expected to take the lease.*set `paths.state`"):
        await take(lease("mine"), hosts["user"])
