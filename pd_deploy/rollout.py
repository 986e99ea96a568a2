"""One run's view of a service: the deployment, its hosts, what they said, and the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pd_deploy import actions, engines, generation, plan, topology
from pd_deploy.barrier import Barrier
from pd_deploy.deployment import Deployment
from pd_deploy.engines.base import HostFacts, Layout
from pd_deploy.errors import OutOfOrder
from pd_deploy.hosts import ContainerState, Host, Hosts, RegistryLogin


@dataclass(frozen=True)
class Survey:
    """What a host says of itself and of this deployment on it. Read-only facts."""

    host: str
    interface: str
    architecture: str
    engine_version: str
    containers: tuple[ContainerState, ...]
    generations: tuple[str, ...]
    listening: frozenset[int]


class Site:
    """A deployment and its connected hosts, shared by all steps of a run."""

    def __init__(
        self, deployment: Deployment, hosts: Hosts, registry_login: RegistryLogin | None = None
    ) -> None:
        self.deployment = deployment
        self.topology = topology.build(deployment)
        self.engine = engines.get(deployment.engine)
        self.hosts = hosts
        self.registry_login = registry_login
        self.barrier = Barrier()

    def host(self, name: str) -> Host:
        """A host by its name in the file."""
        return self.hosts[name]

    def host_of(self, instance: str) -> Host:
        """The host that an instance, or the proxy, runs on."""
        return self.hosts[self.topology.host_of(instance)]


class Rollout:
    """A site with the plan for it, made from what its hosts said."""

    def __init__(
        self,
        site: Site,
        surveys: Mapping[str, Survey],
        addresses: Mapping[str, Mapping[int, str]],
        image: str,
    ) -> None:
        self.site = site
        self.surveys = surveys
        self.plan = plan.make(
            site.deployment,
            site.topology,
            site.engine,
            facts={
                name: HostFacts(survey.interface, addresses.get(name, {}))
                for name, survey in surveys.items()
            },
            image=image,
            generations=[name for survey in surveys.values() for name in survey.generations],
        )
        self.started: set[str] = set()

    @property
    def generation(self) -> generation.Generation:
        """The generation that this run brings up."""
        parsed = generation.Generation.parse(self.plan.generation)
        assert parsed is not None
        return parsed

    def log_directory(self, name: str) -> str:
        """Where an instance writes its log files, on its host."""
        return Layout.of(self.site.deployment, self.plan.generation).log_directory(name)

    def stopping(self) -> list[tuple[str, ContainerState]]:
        """Containers, with their host, that cleanup has to stop."""
        return generation.to_stop(
            self.generation,
            self.plan.instances,
            {name: survey.containers for name, survey in self.surveys.items()},
        )

    def to_clean_up(self) -> tuple[list[str], list[str]]:
        """Proxies and servers, by instance name, that cleanup looks at: all that are in the file
        or on the hosts."""
        topology = self.site.topology
        proxies = dict.fromkeys([topology.proxy.name])
        servers = dict.fromkeys(i.name for i in topology.instances)
        for survey in self.surveys.values():
            for state in survey.containers:
                names = proxies if state.labels[generation.ROLE] == "proxy" else servers
                names.setdefault(state.labels[generation.INSTANCE])
        return list(proxies), list(servers)

    def to_restart(self) -> tuple[list[str], list[str]]:
        """Proxies and servers that must stop before the servers can start as one set.

        Raises:
            OutOfOrder: another generation still runs.
        """
        others = [
            state.name
            for _, state in self.stopping()
            if state.labels[generation.GENERATION] != self.plan.generation
        ]
        if others:
            raise OutOfOrder(
                f"expected no other generation to run, found {', '.join(others)}",
                hint="run the stage `cleanup` first",
            )
        names = {state.labels[generation.INSTANCE] for _, state in self.stopping()}
        proxy = self.site.topology.proxy.name
        return sorted(names & {proxy}), sorted(names - {proxy})

    def with_actions(self, stages: Sequence[str]) -> plan.Plan:
        """The plan with what the stages would change on each host."""
        return actions.with_actions(
            self.plan,
            {name: survey.containers for name, survey in self.surveys.items()},
            {name: survey.generations for name, survey in self.surveys.items()},
            {name: survey.listening for name, survey in self.surveys.items()},
            stages,
        )
