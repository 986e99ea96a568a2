"""From the deployment file to its hosts, logged in to with the credentials of its blocks."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from pd_deploy.blocks import loading
from pd_deploy.blocks.loading import Credentials
from pd_deploy.config.models import Deployment
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.hosts.login import Login
from pd_deploy.records.releases import History, HostAccess
from pd_deploy.steps.session import Session, host_accesses

Logins = dict[str, Callable[[str, int], Login]]
"""Block → what makes a login of a user and a port."""


@asynccontextmanager
async def open_session(
    deployment: Deployment, forget: Iterable[str] = (), *, with_key: bool = False
) -> AsyncIterator[Session]:
    """Give the deployment's hosts, with the credentials of its blocks; close them at the end.

    Connections are made when the first step needs them.

    Args:
        with_key: whether the service is going to be asked what it wants a key for.

    Raises:
        InvalidInput: blocks and variables that do not exist, all at once.
    """
    given = await _credentials(deployment, with_key=with_key)
    hosts = [
        host_of(name, access, given.logins, deployment)
        for name, access in host_accesses(deployment).items()
    ]
    async with Hosts(hosts) as opened:
        yield Session(
            deployment, opened, given.registry_login, frozenset(forget), api_key=given.api_key
        )


async def session_on(shared: dict[HostAccess, Host], deployment: Deployment) -> Session:
    """Give a deployment's hosts as `open_session` does, of which several deployments may have some.

    Args:
        shared: hosts by how they are reached, without their names; gets those that are new.
            Whoever has it closes them.

    Raises:
        InvalidInput: blocks that do not exist, all at once.
    """
    given = await _credentials(deployment, with_key=False)
    named = {}
    for name, place in host_accesses(deployment).items():
        key = place.model_copy(update={"name": ""})
        if key not in shared:
            shared[key] = host_of(name, place, given.logins, deployment)
        named[name] = shared[key]
    return Session(deployment, Hosts.of(named), given.registry_login)


async def open_former(session: Session, history: History, also: Iterable[HostAccess] = ()) -> None:
    """Add hosts on which former generations may have left something; see `locked_session`."""
    addresses = {host.address for host in session.hosts.values()} | session.forgotten
    for access in (*history.record.hosts.values(), *also):
        if access.address not in addresses:
            addresses.add(access.address)
            name = access.address if access.name in session.hosts else access.name
            session.hosts.add(await _former(name, access, session.deployment))


async def _former(name: str, access: HostAccess, deployment: Deployment) -> Host:
    logins: Logins = {}
    if access.credentials:
        key = f"credentials of the former host {access.address}"
        logins = {access.credentials: await loading.ssh(access.credentials, key)}
    return host_of(name, access, logins, deployment)


def host_of(name: str, access: HostAccess, logins: Logins, deployment: Deployment) -> Host:
    """Make a host, not yet connected, that is reached as `access` says."""
    to_login = logins.get(access.credentials or "")
    login = (
        to_login(access.user or "root", access.port)
        if to_login
        else Login(user=access.user, port=access.port)
    )
    return Host(
        name,
        access.address,
        login,
        ssh_address=access.ssh_address,
        docker_socket=access.docker_socket,
        connect_timeout=deployment.gates.connect,
    )


def names_blocks(deployment: Deployment) -> bool:
    """Tell whether a deployment's credentials are in blocks of a Prefect server."""
    accesses = host_accesses(deployment).values()
    ssh = (deployment.ssh.credentials, *(access.credentials for access in accesses))
    api_key = deployment.api_key.credentials if deployment.api_key else None
    return any((*ssh, deployment.registry.credentials, api_key))


async def _credentials(deployment: Deployment, *, with_key: bool) -> Credentials:
    if not names_blocks(deployment) and not (with_key and deployment.api_key):
        return Credentials()
    return await loading.of(deployment, with_key=with_key)
