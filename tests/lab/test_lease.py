"""Leases on real hosts: what the contract of hosts does not ask of every host."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from pd_deploy.errors import HostError
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.lease import Lease
from pd_deploy.hosts.login import Login
from pd_deploy.lab import Lab, LabHost
from tests.host_contract import lease

ROOT = "/var/lib/pd-deploy/leased"


@pytest.fixture
def box(lab: Lab) -> LabHost:
    box = lab.hosts["a"]
    box.run(["rm", "-rf", ROOT])
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
        one.run(["rm", "-rf", ROOT])


async def take(one: Lease, *hosts: Host, wait: float = 0) -> None:
    await one.take([(host, one.owner) for host in hosts], wait)


async def test_two_runs_on_two_hosts_never_wait_for_each_other(hosts: dict[str, Host]) -> None:
    """Both take them in the same order, whatever theirs was."""
    first, second = lease("first", root=ROOT), lease("second", root=ROOT)

    async def work(one: Lease, *order: Host) -> None:
        await take(one, *order, wait=30)
        await one.release(hosts)

    await asyncio.gather(work(first, hosts["a"], hosts["b"]), work(second, hosts["b"], hosts["a"]))


async def test_user_without_a_directory_is_told_which_key_to_set(hosts: dict[str, Host]) -> None:
    with pytest.raises(HostError, match=r"(?s)expected to take the lease.*set `paths.state`"):
        await take(lease("mine", root=ROOT), hosts["user"])
