"""One run's view of a service: the deployment, its hosts, what they said, and the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pd_deploy import engines
from pd_deploy.config.models import Deployment
from pd_deploy.engines.base import Layout
from pd_deploy.errors import OutOfOrder
from pd_deploy.hosts.container_values import ContainerSpec, ContainerState, RegistryLogin
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.hosts.lease import Lease
from pd_deploy.planning import actions, placement, plans
from pd_deploy.records import generations
from pd_deploy.records.releases import History, HostAccess, Record, Release
from pd_deploy.steps.barrier import Barrier
from pd_deploy.steps.history import HostRecords, Saved


@dataclass(frozen=True)
class HostState:
    """What a host says of itself and of this deployment on it. Read-only facts.

    `others` are the running containers of other deployments.
    """

    host: str
    interface: str
    architecture: str
    docker_version: str
    docker_root: str
    containers: tuple[ContainerState, ...]
    others: tuple[ContainerState, ...]
    listening: frozenset[int]
    past: HostRecords


class Session:
    """A deployment and its connected hosts, shared by all steps of a run.

    `hosts` may have more than the deployment: those that a former generation ran on. `forgotten`
    are the addresses of such hosts that are gone for good.
    """

    def __init__(
        self,
        deployment: Deployment,
        hosts: Hosts,
        registry_login: RegistryLogin | None = None,
        lease: Lease | None = None,
    ) -> None:
        self.deployment = deployment
        self.topology = placement.derive(deployment)
        self.engine = engines.get(deployment.engine)
        self.hosts = hosts
        self.registry_login = registry_login
        self.forgotten: frozenset[str] = frozenset()
        self.barrier = Barrier()
        self.lease = lease
        if lease:
            lease.watchers.append(self.barrier.fail)

    def lock_with(self, lease: Lease) -> None:
        """Changes are made only while this lease holds; all waits end when it is lost."""
        self.lease = lease
        lease.watchers.append(self.barrier.fail)

    @property
    def root(self) -> str:
        """The deployment's own directory on its hosts."""
        return Layout.root_of(self.deployment)

    @property
    def former(self) -> list[str]:
        """Hosts that the deployment no longer has, by name."""
        return [name for name in self.hosts if name not in self.deployment.hosts]

    def host(self, name: str) -> Host:
        """A host by its name in the file."""
        return self.hosts[name]

    def host_of(self, instance: str) -> Host:
        """The host that an instance, or the proxy, runs on."""
        return self.hosts[self.topology.host_of(instance)]

    async def may_change(self, host: Host) -> None:
        """To be called before each change on a host: looks whether the run still may.

        Raises:
            LeaseLost: another run has taken over.
        """
        assert self.lease is not None, "nothing is changed without a lease"
        await self.lease.check(host)

    def turned_to(self, deployment: Deployment) -> "Session":
        """The same hosts for another state of the deployment, each under its name there."""
        by_address = {host.address: host for host in self.hosts.values()}
        named = {name: by_address.pop(entry.address) for name, entry in deployment.hosts.items()}
        for host in by_address.values():
            named[host.name if host.name not in named else host.where] = host
        session = Session(deployment, Hosts.of(named), self.registry_login, self.lease)
        session.forgotten = self.forgotten
        return session


@dataclass
class Downtime:
    """From when clients could not connect until they could again, by the controller's clock.

    `since` may lie before this run: an earlier one may have left the service down.

    Attributes:
        proof: seconds of it that went into the smoke test.
    """

    since: datetime | None = None
    until: datetime | None = None
    proof: float = 0.0

    def begin(self) -> None:
        """The proxy is about to close; what was down already stays so."""
        self.since = self.since or datetime.now(UTC)

    def end(self) -> None:
        """Clients can connect."""
        self.until = datetime.now(UTC)

    def never(self) -> None:
        """Nothing was down after all."""
        self.since = None

    @property
    def seconds(self) -> float:
        """How long; up to now if it still lasts."""
        return ((self.until or datetime.now(UTC)) - self.since).total_seconds() if self.since else 0

    def __str__(self) -> str:
        proof = f", {self.proof:.1f} s of it for the smoke test" if self.proof else ""
        return f"down for {self.seconds:.1f} s{proof}"


@dataclass
class Rollout:
    """A session with the plan for it, and what its hosts said.

    Attributes:
        release: what the generation says of itself.
        started: instances that this run has started.
        stopped: whether this run has stopped anything that ran: from then on a failure is undone.
    """

    session: Session
    states: Mapping[str, HostState]
    history: History
    plan: plans.Plan
    release: Release
    rule: str = ""
    started: set[str] = field(default_factory=set)
    stopped: bool = False
    downtime: Downtime = field(default_factory=Downtime)

    def log_directory(self, name: str) -> str:
        """Where an instance writes its log files, on its host."""
        layout = Layout.of(self.session.deployment, self.plan.generation_of(name))
        return layout.log_directory(name)

    @property
    def changes(self) -> bool:
        """Whether anything is to be done at all."""
        return any(host.actions for host in self.with_actions(plans.STAGES).hosts.values())

    def remember(self, record: Record) -> None:
        """Takes note of a record that was written."""
        self.history = replace(self.history, record=record)

    @property
    def saved(self) -> Saved:
        """What brings the generation back."""
        return Saved(deployment=self.session.deployment, plan=self.plan)

    @property
    def containers(self) -> dict[str, tuple[ContainerState, ...]]:
        """The deployment's containers by host."""
        return {name: survey.containers for name, survey in self.states.items()}

    def stopping(self) -> list[tuple[str, ContainerState]]:
        """Containers, with their host, that cleanup has to stop."""
        return generations.to_stop(self.plan.roles, self.containers)

    def to_start(self, host: str) -> list[ContainerSpec]:
        """Containers on a host that do not run, or have to stop first."""
        states = self.states[host].containers if host in self.states else ()
        stopping = {state.name for _, state in self.stopping()}
        running = {s.name for s in states if s.status in generations.RUNNING} - stopping
        planned = self.plan.hosts.get(host)
        specs = planned.containers.values() if planned else ()
        return [spec for spec in specs if spec.name not in running]

    def may_prepare_early(self) -> bool:
        """Whether the proxy can be prepared while the old one still serves."""
        name = self.plan.container(self.session.topology.proxy.name).name
        return name not in {state.name for _, state in self.stopping()}

    def to_clean_up(self) -> tuple[list[str], list[str]]:
        """Proxies and servers, by instance name, that cleanup looks at: all that are in the file
        or on the hosts."""
        topology = self.session.topology
        proxies = dict.fromkeys([topology.proxy.name])
        servers = dict.fromkeys(i.name for i in topology.instances)
        for containers in self.containers.values():
            for state in containers:
                names = proxies if state.labels[generations.ROLE] == "proxy" else servers
                names.setdefault(state.labels[generations.INSTANCE])
        return list(proxies), list(servers)

    def to_restart(self) -> tuple[list[str], list[str]]:
        """Proxies and servers that must stop before the servers can start as one set.

        Raises:
            OutOfOrder: another generation still runs.
        """
        others = [s.name for _, s in self.stopping() if s.name not in self.plan.roles]
        if others:
            raise OutOfOrder(
                f"expected no other generation to run, found {', '.join(others)}",
                hint="run the stage `cleanup` first",
            )
        names = {state.labels[generations.INSTANCE] for _, state in self.stopping()}
        proxy = self.session.topology.proxy.name
        return sorted(names & {proxy}), sorted(names - {proxy})

    def with_actions(self, stages: Sequence[str]) -> plans.Plan:
        """The plan with what the stages would change on each host."""
        return actions.with_actions(
            self.plan,
            self.containers,
            {name: survey.past.generations for name, survey in self.states.items()},
            {name: survey.listening for name, survey in self.states.items()},
            stages,
        )


def host_accesses(deployment: Deployment) -> dict[str, HostAccess]:
    """How the hosts of a deployment are reached."""
    logins = {name: entry.ssh or deployment.ssh for name, entry in deployment.hosts.items()}
    return {
        name: HostAccess(
            name=name,
            address=entry.address,
            user=logins[name].user,
            port=logins[name].port,
            credentials=logins[name].credentials,
        )
        for name, entry in deployment.hosts.items()
    }
