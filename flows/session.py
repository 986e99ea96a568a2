"""From the deployment file to connected hosts: load credentials from blocks, log in, lock."""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

from prefect import runtime
from prefect.blocks.core import Block

from pd_deploy.blocks.registry import RegistryCredentials
from pd_deploy.blocks.ssh import SshCredentials
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.flows.dead import bury
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.hosts.login import Login
from pd_deploy.records.releases import History, HostAccess
from pd_deploy.steps import host_records, locking
from pd_deploy.steps.session import LockedSession, Session, host_accesses
from pd_deploy.tasks import connect, lock

B = TypeVar("B", bound=Block)

_COMMANDS: dict[type[Block], str] = {
    SshCredentials: "pd-deploy credentials ssh",
    RegistryCredentials: "pd-deploy credentials registry",
}


@asynccontextmanager
async def open_session(
    deployment: Deployment, forget: Iterable[str] = ()
) -> AsyncIterator[Session]:
    """Give the deployment's hosts, with the credentials of its blocks; close them at the end.

    Connections are made when the first step needs them.

    Raises:
        InvalidInput: blocks that do not exist, all at once.
    """
    blocks, registry_login = await _load_blocks(deployment)
    hosts = [
        _host(name, access, blocks.get(access.credentials or ""), deployment)
        for name, access in host_accesses(deployment).items()
    ]
    async with Hosts(hosts) as opened:
        yield Session(deployment, opened, registry_login, forget)


async def session_on(shared: dict[HostAccess, Host], deployment: Deployment) -> Session:
    """Give a deployment's hosts as `open_session` does, of which several deployments may have some.

    Args:
        shared: hosts by how they are reached, without their names; gets those that are new.
            Whoever has it closes them.

    Raises:
        InvalidInput: blocks that do not exist, all at once.
    """
    blocks, registry_login = await _load_blocks(deployment)
    named = {}
    for name, place in host_accesses(deployment).items():
        key = place.model_copy(update={"name": ""})
        if key not in shared:
            block = blocks.get(place.credentials or "")
            shared[key] = _host(name, place, block, deployment)
        named[name] = shared[key]
    return Session(deployment, Hosts.of(named), registry_login)


@asynccontextmanager
async def locked_session(
    deployment: Deployment,
    run: str,
    also: Callable[[History], Iterable[HostAccess]] = lambda _: (),
    forget: Iterable[str] = (),
) -> AsyncIterator[LockedSession]:
    """Connect to the deployment's hosts, former ones included, and lock them for this run.

    Args:
        run: the run, for those who find the hosts locked.
        also: further hosts that the run needs, from the deployment's past.
        forget: addresses of former hosts that are gone for good.
    """
    async with open_session(deployment, forget) as opened, locked(opened, run, also) as session:
        yield session


@asynccontextmanager
async def locked(
    session: Session, run: str, also: Callable[[History], Iterable[HostAccess]] = lambda _: ()
) -> AsyncIterator[LockedSession]:
    """Lock the hosts of a session; see `locked_session`."""
    history = await connected(session)
    _require_former(session, history)
    await open_former(session, history, also(history))
    lease = locking.lease_for(session, run, str(runtime.flow_run.id), history.lease)
    with_lease = LockedSession.of(session, lease)
    async with lease.held(with_lease.hosts):
        await lock(with_lease)
        for owner in {owner.flow_run: owner for owner in lease.dead}.values():
            await bury(owner, run)
        yield with_lease


def patient(deployment: Deployment, seconds: float) -> Deployment:
    """Let a run wait longer for the deployment's leases than somebody at a prompt would."""
    gates = deployment.gates.model_copy(update={"lease": max(seconds, deployment.gates.lease)})
    return deployment.model_copy(update={"gates": gates})


def _require_former(session: Session, history: History) -> None:
    """Refuse to forget what is no host that the deployment has left.

    Raises:
        InvalidInput: each such address.
    """
    present = {host.address for host in session.hosts.values()}
    former = sorted(history.record.hosts.keys() - present)
    problems = [
        Problem(
            "forget",
            f"expected the address of a host that has left the file "
            f"({', '.join(former) or 'there is none'}), found {address!r}",
        )
        for address in sorted(session.forgotten)
        if address not in former
    ]
    if problems:
        raise InvalidInput(problems)


async def connected(session: Session) -> History:
    """Connect to all hosts; return what was deployed on them before."""
    return host_records.merged(
        await fan_out(session.barrier, [connect(session, name) for name in list(session.hosts)])
    )


async def open_former(session: Session, history: History, also: Iterable[HostAccess] = ()) -> None:
    """Add hosts on which former generations may have left something; see `locked_session`."""
    addresses = {host.address for host in session.hosts.values()} | session.forgotten
    for access in (*history.record.hosts.values(), *also):
        if access.address not in addresses:
            addresses.add(access.address)
            name = access.address if access.name in session.hosts else access.name
            session.hosts.add(await _former(name, access, session.deployment))


async def _former(name: str, access: HostAccess, deployment: Deployment) -> Host:
    key = f"credentials of the former host {access.address}"
    block = await _load(SshCredentials, access.credentials, key) if access.credentials else None
    return _host(name, access, block, deployment)


def _host(
    name: str, access: HostAccess, block: SshCredentials | None, deployment: Deployment
) -> Host:
    return Host(
        name,
        access.address,
        _login(access, block),
        ssh_address=access.ssh_address,
        docker_socket=access.docker_socket,
        connect_timeout=deployment.gates.connect,
    )


async def _load_blocks(
    deployment: Deployment,
) -> tuple[dict[str, SshCredentials], RegistryLogin | None]:
    """Load the blocks that a deployment names: those for SSH by name, and the registry's login."""
    keys = {"ssh.credentials": deployment.ssh.credentials}
    for name, entry in deployment.hosts.items():
        keys[f"hosts.{name}.ssh.credentials"] = entry.ssh.credentials if entry.ssh else None
    problems: list[Problem] = []
    blocks: dict[str, SshCredentials] = {}
    login = None
    for key, block in keys.items():
        if block and block not in blocks:
            try:
                blocks[block] = await _load(SshCredentials, block, key)
            except InvalidInput as error:
                problems += error.problems
    if block := deployment.registry.credentials:
        try:
            login = (await _load(RegistryCredentials, block, "registry.credentials")).login()
        except InvalidInput as error:
            problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return blocks, login


def _login(access: HostAccess, block: SshCredentials | None) -> Login:
    if block:
        return block.login(user=access.user or "root", port=access.port)
    return Login(user=access.user, port=access.port)


async def _load(kind: type[B], name: str, key: str) -> B:
    try:
        block = await kind.aload(name)
    except json.JSONDecodeError:
        raise  # what answers is no Prefect server
    except ValueError as error:
        raise InvalidInput(
            [
                Problem(
                    key,
                    f"expected a block {kind.get_block_type_slug()}/{name}, found none; create it "
                    f"in the UI under Blocks, or with `{_COMMANDS[kind]} {name}`",
                )
            ]
        ) from error
    return block
