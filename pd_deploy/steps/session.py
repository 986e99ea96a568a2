"""The connected hosts of a deployment, and the right to change them."""

import asyncio
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Self

from pydantic import SecretStr

from pd_deploy import engines
from pd_deploy.config.models import Deployment, Ssh
from pd_deploy.config.topology import Topology
from pd_deploy.engines.base import Engine, Layout
from pd_deploy.errors import NoSuchGeneration, PdDeployError
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.hosts.lease import Lease
from pd_deploy.planning import placement
from pd_deploy.records.releases import HostAccess
from pd_deploy.steps.barrier import Barrier
from pd_deploy.steps.timeline import Timeline


@dataclass(frozen=True, eq=False)
class Session:
    """A deployment and its connected hosts, shared by all steps of a run; nothing is changed in it.

    Attributes:
        deployment: what the file says, or said.
        hosts: the deployment's, and those that a former generation ran on.
        registry_login: credentials for pulling.
        forgotten: addresses of former hosts that are gone for good.
        timeline: the run's.
        api_key: what the service wants of its clients, if anything.
    """

    deployment: Deployment
    hosts: Hosts
    registry_login: RegistryLogin | None = None
    forgotten: frozenset[str] = frozenset()
    timeline: Timeline = field(default_factory=Timeline)
    api_key: SecretStr | None = None

    @cached_property
    def topology(self) -> Topology:
        """What follows from the deployment."""
        return placement.derive(self.deployment)

    @cached_property
    def engine(self) -> Engine:
        """The deployment's."""
        return engines.get(self.deployment.engine)

    @cached_property
    def barrier(self) -> Barrier:
        """What ends the steps of this state of the deployment once one has failed."""
        return Barrier()

    @cached_property
    def pulling(self) -> asyncio.Semaphore:
        """Held by each host that pulls."""
        return asyncio.Semaphore(self.deployment.pull_at_once)

    @property
    def root(self) -> str:
        """The deployment's own directory on its hosts."""
        return Layout.root_of(self.deployment)

    @property
    def authorization(self) -> dict[str, str]:
        """The header by which the service knows a client; none if it asks for no key."""
        key = self.api_key
        return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}

    @property
    def former(self) -> list[str]:
        """Hosts that the deployment no longer has, by name."""
        return [name for name in self.hosts if name not in self.deployment.hosts]

    def tell_if_former(self, error: PdDeployError) -> None:
        """Say what to do next, where a host does not answer that the deployment no longer has."""
        for name in self.former:
            host = self.hosts[name]
            if error.host == host.where:
                error.hint = (
                    "it has left the file, but the deployment may still run there; if it is gone "
                    f"for good: `pd-deploy deploy FILE --forget {host.address}`"
                )

    @property
    def present(self) -> list[str]:
        """The deployment's hosts that the session has, by name: all, but for a look at those that
        answer."""
        return [name for name in self.deployment.hosts if name in self.hosts]

    @property
    def registry_host(self) -> Host:
        """The host through which registries are asked: the first proxy's, if it is present."""
        home = self.topology.home
        return self.hosts[home if home in self.hosts else self.present[0]]

    @property
    def proxies_first(self) -> tuple[list[str], list[str]]:
        """Hosts with proxies, by name, and all others: in the order in which a service stops."""
        proxies = list(dict.fromkeys(proxy.host for proxy in self.topology.proxies))
        return proxies, [name for name in self.hosts if name not in proxies]

    def host(self, name: str) -> Host:
        """Return a host by its name in the file."""
        return self.hosts[name]

    def host_of(self, instance: str) -> Host:
        """Return the host that an instance, or a proxy, runs on."""
        return self.hosts[self.topology.host_of(instance)]

    async def may_change(self, host: Host) -> None:
        """Let a session without a lease bring images to a host and ask them what they are, which is
        no other run's business."""

    def for_deployment(self, deployment: Deployment) -> Self:
        """Take the same hosts for another state of the deployment, each under its name there."""
        by_address = {host.address: host for host in self.hosts.values()}
        if gone := [e.address for e in deployment.hosts.values() if e.address not in by_address]:
            raise NoSuchGeneration(
                f"expected the hosts of that generation, found that {', '.join(gone)} was "
                "forgotten or has left the deployment",
                hint="choose another one: `pd-deploy releases FILE`",
            )
        named = {name: by_address.pop(entry.address) for name, entry in deployment.hosts.items()}
        for host in by_address.values():
            named[host.name if host.name not in named else host.where] = host
        return replace(self, deployment=deployment, hosts=Hosts.of(named))

    def with_deployment(self, deployment: Deployment) -> Self:
        """Take another state of the deployment, on the same hosts under the same names."""
        return replace(self, deployment=deployment)

    def with_hosts(self, hosts: Hosts) -> Self:
        """Take the same deployment on these hosts alone."""
        return replace(self, hosts=hosts)


@dataclass(frozen=True, eq=False)
class LockedSession(Session):
    """A session that may change its hosts, for as long as its lease holds.

    All waits end when the lease is lost.
    """

    lease: Lease = field(kw_only=True)

    def __post_init__(self) -> None:
        """Have the lease end what waits."""
        self.lease.watchers.append(self.barrier.fail)

    @classmethod
    def of(cls, session: Session, lease: Lease) -> "LockedSession":
        """Give a session a lease on its hosts."""
        return cls(**{f.name: getattr(session, f.name) for f in fields(Session)}, lease=lease)

    async def may_change(self, host: Host) -> None:
        """Check that the run still may change a host; call it before each change.

        Raises:
            LeaseLost: another run has taken over.
        """
        await self.lease.check(host)


def host_accesses(deployment: Deployment) -> dict[str, HostAccess]:
    """Return how the hosts of a deployment are reached."""
    logins: dict[str, Ssh] = {n: e.ssh or deployment.ssh for n, e in deployment.hosts.items()}
    return {
        name: HostAccess(
            name=name,
            address=entry.address,
            user=logins[name].user,
            port=logins[name].port,
            credentials=logins[name].credentials,
            ssh_address=entry.ssh.address if entry.ssh else None,
            docker_socket=entry.docker_socket,
        )
        for name, entry in deployment.hosts.items()
    }
