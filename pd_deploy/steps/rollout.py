"""One run's view of a service: the deployment, its hosts, what they said, and the plan."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from pd_deploy.code.reading import Source
from pd_deploy.config.topology import Proxy
from pd_deploy.engines.base import HostFacts, Layout
from pd_deploy.engines.image_facts import brief
from pd_deploy.errors import OutOfOrder
from pd_deploy.hosts.container_values import ContainerState, ListedContainer, Mount
from pd_deploy.hosts.facts import Seen
from pd_deploy.planning import actions, plans
from pd_deploy.records import generations
from pd_deploy.records.adopted import AdoptedContainer
from pd_deploy.records.releases import History, Release
from pd_deploy.steps.attempt import Attempt
from pd_deploy.steps.host_records import HostRecords, Saved
from pd_deploy.steps.session import LockedSession, Session


@dataclass(frozen=True)
class HostState:
    """What a host says of itself and of this deployment on it. Read-only facts.

    Attributes:
        tree: what lies in the deployment's own directories, by path.
        route_address: its own address on its default route; None if it has no such route.
        strangers: all containers that are not of one of its generations.
        waiting_rooms: those that it has for this deployment, running or not.
        probe_left: whether a run was killed there while it asked an image what it is.
    """

    host: str
    interface: str
    architecture: str
    docker_version: str
    docker_root: str
    containers: tuple[ContainerState, ...]
    listening: frozenset[int]
    tree: Mapping[str, Seen]
    records: HostRecords
    route_address: str | None = None
    strangers: tuple[ListedContainer, ...] = ()
    waiting_rooms: tuple[ListedContainer, ...] = ()
    probe_left: bool = False

    @property
    def others(self) -> list[ListedContainer]:
        """The running containers of other deployments."""
        running = (c for c in self.strangers if c.status in generations.RUNNING)
        return [c for c in running if generations.DEPLOYMENT in c.labels]

    @property
    def unlabelled(self) -> list[ListedContainer]:
        """The containers that no deployment of ours has made."""
        return [c for c in self.strangers if generations.DEPLOYMENT not in c.labels]

    @property
    def has_leftovers(self) -> bool:
        """Whether a run has left a container of its own there, or was killed while it wrote a
        file."""
        return (
            self.probe_left
            or bool(self.waiting_rooms)
            or any(re.fullmatch(r".*/\.[^/]*\.tmp", path) for path in self.tree)
        )


@dataclass(frozen=True)
class Rollout:
    """A session with the plan for it, and what its hosts said.

    Attributes:
        states: by host.
        surveyed_history: what the hosts knew of the deployment's past when they were surveyed.
        release: what the generation says of itself.
        rule: why its image was chosen.
        attempt: what this run has done so far.
        newer_tags: tags that seem newer than its image, but are of forms that `update` does not
            take.
        source: the user's own source tree; None where there is none, or an older generation comes
            back, whose tree is on the hosts.
        failed: instances, or proxies, whose containers run and have to start again.
        facts: what the plan was made of, by host; empty if an older version has saved it.
    """

    session: Session
    states: Mapping[str, HostState]
    surveyed_history: History
    plan: plans.Plan
    release: Release
    rule: str
    attempt: Attempt
    newer_tags: tuple[str, ...] = ()
    source: Source | None = None
    failed: frozenset[str] = frozenset()
    facts: dict[str, HostFacts] = field(default_factory=dict)

    @property
    def locked(self) -> LockedSession:
        """Its session, for whoever changes a host.

        Raises:
            OutOfOrder: it was planned to be looked at only.
        """
        if isinstance(self.session, LockedSession):
            return self.session
        raise OutOfOrder(
            "expected a session that holds the deployment's lease, found a read-only one"
        )

    @property
    def history(self) -> History:
        """The deployment's past, with the record as it is now."""
        return replace(self.surveyed_history, record=self.attempt.record)

    @property
    def way_back(self) -> Release | None:
        """What serves again if this fails: what serves, or where that ran on a host which is gone
        for good, the last good one that did not."""
        serving, forgotten = self.history.serving, self.session.forgotten
        if serving is None or forgotten.isdisjoint(serving.addresses):
            return serving
        others = [name for name in self.history.good if name != self.plan.generation]
        releases = (self.history.releases[name] for name in reversed(others))
        return next((r for r in releases if forgotten.isdisjoint(r.addresses)), serving)

    @cached_property
    def changes(self) -> bool:
        """Whether anything is to be done at all: a container does not run, a file is not as
        planned, a host lacks a directory or the generation's account of itself, or another run has
        left a waiting room, which may be in a proxy's way."""
        noted = (
            self.surveyed_history.record.on(self.release.hosts.values())
            is self.surveyed_history.record
        )
        return (
            not noted
            or any(map(self.has_waiting_room, self.session.topology.proxies))
            or any(host.actions for host in self._whole.hosts.values())
            or any(map(self._lacks, self._whole.hosts))
        )

    @cached_property
    def _whole(self) -> plans.Plan:
        """The plan with all that a whole run would do."""
        return self.with_actions(plans.STAGES)

    def is_made(self, host: str) -> bool:
        """Tell whether a host has all files and containers of the generation, as they are to be:
        then nothing is left to be done there but to stop and start."""
        verbs = {action.verb for action in self._whole.hosts[host].actions}
        return verbs.isdisjoint(("write", "create")) and not self._lacks(host)

    def has_waiting_room(self, proxy: Proxy) -> bool:
        """Tell whether a run before this one has left a container that may hold requests."""
        rooms = generations.waiting_rooms(self.states[proxy.host].waiting_rooms, proxy.name)
        return any(room.status in generations.RUNNING for room in rooms)

    def _lacks(self, host: str) -> bool:
        state = self.states[host]
        directories = self.plan.hosts[host].directories
        directories += [mount.source for mount in self.code_on(host).values()]
        has_directories = all(path in state.tree for path in directories)
        return not has_directories or all(
            release.generation != self.plan.generation for release in state.records.releases
        )

    def code_on(self, host: str) -> dict[str, Mount]:
        """Return the source trees that a host's containers mount, by who sees them."""
        return self.plan.hosts[host].code(Layout.code_root(self.session.root))

    @property
    def said_by_image(self) -> str:
        """What its image says of itself, in a line; empty where its engine asks none."""
        engine = self.session.engine
        if not engine.probe_command():
            return ""
        contract = f"contract {self.session.deployment.contract}; " if engine.BY_CONTRACT else ""
        facts = self.history.record.facts_of(self.release.digest)
        if facts:
            said = "; ".join(dict.fromkeys(map(brief, facts.values())))
            return f"{contract}the image has {said}"
        if self.history.record.silent_on(self.release.digest):
            return f"contract {contract}, as the file says; the image did not say what it is"
        return f"{contract}no run has asked the image yet what it is"

    @property
    def said_of_changes(self) -> str:
        """What its generation changes against the one before, in a line; empty if that is not
        known, or there was none."""
        against = self.release.against
        return f"changed against {against}: {self.release.changed}" if against else ""

    @property
    def is_last_resort(self) -> bool:
        """Whether there is nothing else to go back to: the service is down, and this is the
        generation that is to serve."""
        serving = self.history.record.serving
        return bool(self.attempt.downtime.since) and serving == self.plan.generation

    @cached_property
    def saved(self) -> Saved:
        """What brings the generation back."""
        return Saved(deployment=self.session.deployment, plan=self.plan, facts=self.facts)

    @property
    def containers(self) -> dict[str, tuple[ContainerState, ...]]:
        """The deployment's containers by host."""
        return {name: state.containers for name, state in self.states.items()}

    @property
    def runs(self) -> dict[str, str]:
        """Which run of its container each instance of the plan was when the hosts were surveyed."""
        instances = {container: name for name, container in self.plan.container_names.items()}
        listed = [state for states in self.containers.values() for state in states]
        return {instances[s.name]: s.run for s in listed if s.name in instances}

    @cached_property
    def stopping(self) -> list[tuple[str, ContainerState]]:
        """Containers, with their host, that cleanup has to stop."""
        names = self.plan.container_names
        instances = {container: name for name, container in names.items()}

        def restarts_with(container: str) -> list[str]:
            session, name = self.session, instances[container]
            again = session.engine.restarts_with(session.deployment, session.topology, name)
            return [names[instance] for instance in again]

        failed = {names[name] for name in self.failed}
        return generations.to_stop(self.plan.roles, self.containers, restarts_with, failed)

    @property
    def stays_open(self) -> bool:
        """Whether clients can go on to connect while it restarts the rest: a proxy stays."""
        return bool(self.staying)

    @cached_property
    def staying(self) -> frozenset[str]:
        """The proxies that are open to clients, and stay so."""
        if self.surveyed_history.record.closed:
            return frozenset()
        runs = {s.name for states in self.containers.values() for s in states if s.running}
        runs -= self._names_stopping
        names = self.session.topology.proxy_names
        return frozenset(n for n in names if self.plan.instance(n).container.name in runs)

    @cached_property
    def leaving(self) -> list[tuple[str, AdoptedContainer]]:
        """Running containers of an adopted service, with their host, that cleanup has to stop."""
        service = self.surveyed_history.record.adopted
        if service is None:
            return []
        names = {host.address: name for name, host in self.session.hosts.items()}
        ids = {
            self.session.host(name).address: {
                c.id for c in state.strangers if c.status in generations.RUNNING
            }
            for name, state in self.states.items()
        }
        return [(names[c.host], c) for c in service.running(ids)]

    @property
    def may_cut(self) -> bool:
        """Whether no client's request can be under way: the service is down, and no proxy runs, or
        no decode, which finishes answers also where all prefills have ended."""
        runs = {
            state.labels.get(generations.ROLE)
            for states in self.containers.values()
            for state in states
            if state.running
        }
        runs |= {container.role for _, container in self.leaving}
        return self.attempt.was_down and not runs >= {"proxy", "decode"}

    @cached_property
    def _names_stopping(self) -> frozenset[str]:
        return frozenset(state.name for _, state in self.stopping)

    def to_start(self, host: str) -> list[plans.InstancePlan]:
        """Instances on a host whose container does not run, or has to stop first."""
        states = self.states[host].containers if host in self.states else ()
        running = {s.name for s in states if s.status in generations.RUNNING}
        running -= self._names_stopping
        instances = self.plan.hosts[host].instances.values() if host in self.plan.hosts else ()
        return [instance for instance in instances if instance.container.name not in running]

    @property
    def all_run(self) -> bool:
        """Whether all of its containers run, and nothing else does."""
        return not (self.stopping or self.leaving) and not any(map(self.to_start, self.plan.hosts))

    def may_prepare_early(self, proxy: str) -> bool:
        """Whether a proxy can be prepared while the old one still serves."""
        return self.plan.instance(proxy).container.name not in self._names_stopping

    def to_clean_up(self) -> tuple[list[str], list[str]]:
        """Proxies and servers, by instance name, that cleanup looks at: all that are in the file
        or on the hosts."""
        topology = self.session.topology
        proxies = dict.fromkeys(topology.proxy_names)
        servers = dict.fromkeys(i.name for i in topology.instances)
        for containers in self.containers.values():
            for state in containers:
                names = proxies if state.labels[generations.ROLE] == "proxy" else servers
                names.setdefault(state.labels[generations.INSTANCE])
        for _, container in self.leaving:
            names = proxies if container.role == "proxy" else servers
            names.setdefault(container.instance)
        return list(proxies), list(servers)

    def to_restart(self) -> tuple[list[str], list[str]]:
        """Proxies and servers that must stop before the servers can start as one set.

        Raises:
            OutOfOrder: another generation still runs.
        """
        others = [s.name for _, s in self.stopping if s.name not in self.plan.roles]
        others += [container.name for _, container in self.leaving]
        if others:
            raise OutOfOrder(
                f"expected no other generation to run, found {', '.join(others)}",
                hint="run the stage `cleanup` first",
            )
        names = {state.labels[generations.INSTANCE] for _, state in self.stopping}
        proxies = names.intersection(self.session.topology.proxy_names)
        return sorted(proxies), sorted(names - proxies)

    def with_actions(self, stages: Sequence[str]) -> plans.Plan:
        """Add to the plan what the stages would change on each host."""
        return actions.with_actions(
            self.plan,
            self.containers,
            {name: state.tree for name, state in self.states.items()},
            {name: state.listening for name, state in self.states.items()},
            [
                *((host, container.name) for host, container in self.leaving),
                *((host, state.name) for host, state in self.stopping),
            ],
            stages,
        )
