"""Looking at a service from all sides, as `pd-deploy status` does: changes nothing, runs no request
of its own through the service, and a host may be away.

Per host: two sessions, one for what a survey reads and one for lease and devices, beside calls to
its Docker engine; per server: its health and its counters. All hosts are asked at the same time.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

import httpx

from pd_deploy.errors import PdDeployError, is_transient
from pd_deploy.hosts import lease
from pd_deploy.hosts.concurrent import task_group, together
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.lease import Holding
from pd_deploy.planning.plans import STAGES
from pd_deploy.records import releases
from pd_deploy.records import status as statuses
from pd_deploy.records.adopted import UNCOMPARED, AdoptedContainer, AdoptedService
from pd_deploy.records.generations import GENERATION, RUNNING
from pd_deploy.records.releases import Choice, History, Release, Starts
from pd_deploy.records.status import SERVES, Status, Verdict
from pd_deploy.steps import host_records, surveying
from pd_deploy.steps.asking import answer_of, or_error
from pd_deploy.steps.inspecting import devices_on
from pd_deploy.steps.rollout import HostState
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import Addresses, ResolvedImage
from pd_deploy.steps.verify import metrics

ANSWER_TIMEOUT_S = 3.0
HEALTHY = "healthy"
Cause = Literal["", "late", "silent", "refused", "status"]
"""Why a port's answer is not as it should be: the way there was lost, or took too long; the port is
open, and nothing came in time; nobody listens, or hangs up; another status than 200. Empty if it is
as it should be."""
_WORST: tuple[Cause, ...] = ("refused", "status", "silent", "late", "")
"""Of several ports of an instance the first of these counts."""
NOT_KNOWN = "not known"
SHOWN = 3


@dataclass(frozen=True)
class InstanceLook:
    """An instance, or a proxy, as it is.

    Attributes:
        container: Docker's word for its container's state, or `gone`; empty if that is not known.
        health: `healthy`, or what is wrong with its answer; empty if it was not asked.
        cause: the kind of that.
        since: when its container was started last or, if it has ended, when it ended.
        restarts: how often its container was started again since its generation was promoted, at
            least; None where it was, and nobody has counted. Docker counts only what it restarts by
            itself, which pd-deploy does not let it do.
        started_outside: whether its last start is by nobody who counts: by hand, or by a run that
            was killed.
        run: tells this run of its container from all others.
        requests: completed requests that its servers count; None where they don't.
        kv_tokens: prompt tokens whose KV it got from a prefill; None where it does not count them.
    """

    name: str
    role: str
    host: str
    devices: tuple[int, ...] = ()
    container: str = ""
    health: str = ""
    cause: Cause = ""
    since: datetime | None = None
    restarts: int | None = None
    started_outside: bool = False
    run: str = ""
    requests: float | None = None
    kv_tokens: float | None = None


@dataclass(frozen=True)
class HostLook:
    """A host as it is.

    Attributes:
        away: why it could not be looked at; empty if it was.
        devices: the state of the devices that the service uses there; empty where nothing tells it.
        lease: who works there, if anybody does.
    """

    name: str
    address: str
    away: str = ""
    devices: str = ""
    lease: Holding | None = None


@dataclass(frozen=True)
class Look:
    """A service from all sides.

    Attributes:
        session: with the deployment as it was for what serves, as far as that could be read.
        release: what serves, or is to.
        others: containers that run, and are of another generation than what serves.
        drift: how the hosts differ from what the file makes; None if that is not known.
        drift_unknown: why it is not.
    """

    status: Status
    session: Session
    history: History
    release: Release | None
    instances: Sequence[InstanceLook]
    hosts: Sequence[HostLook]
    others: Sequence[str]
    drift: str | None
    drift_unknown: str = ""

    @property
    def trouble(self) -> str:
        """All that is not as it should be, in a line: of what serves, then of devices."""
        parts = [] if self.status.state == SERVES else [self.status.state]
        parts += [
            f"{host.name} ({host.address}): {host.devices}"
            for host in self.hosts
            if host.devices not in ("", HEALTHY)
        ]
        return "; ".join(parts)

    @property
    def verdict(self) -> Verdict | None:
        """That of the status; a service with a faulty device is degraded, though it serves."""
        if self.status.verdict == Verdict.SERVING and self.trouble:
            return Verdict.DEGRADED
        return self.status.verdict


@dataclass(frozen=True)
class _Said:
    """What a host said of its devices, and who works there."""

    look: HostLook
    addresses: Addresses


async def look(session: Session, *, as_deployed: bool = False) -> Look:
    """Look at a service and all of its hosts, former ones excepted.

    Args:
        as_deployed: read what the file said when what serves was deployed in any case, not only
            where the hosts differ from what it says now.
    """
    names = list(session.deployment.hosts)
    async with task_group() as group:
        # Tools for devices take longer than everything else.
        asking = {name: group.create_task(_ask(session, name)) for name in names}
        surveys = (answer_of(session.host(n), surveying.survey(session, n)) for n in names)
        answers = dict(zip(names, await together(surveys), strict=True))
        states = {n: state for n, state in answers.items() if isinstance(state, HostState)}
        away = {n: error for n, error in answers.items() if isinstance(error, PdDeployError)}
        for name in away:
            asking[name].cancel()
        history = surveying.history_of(states.values())
        serving = history.serving
        choice = releases.choose(session.deployment.image, None, serving)
        as_deployed |= serving is not None and choice.digest != serving.digest
        then = await _as_deployed(session, states, history) if as_deployed else session
        instances = await _instances(then, states, history)
        said = {name: await asking[name] for name in states}
    addresses = [one.addresses for one in said.values()]
    drift, drift_unknown = _drift(session, history, choice, [*states.values()], addresses, away)
    if drift and not as_deployed:
        then = await _as_deployed(session, states, history)
        instances = await _instances(then, states, history)
    status = statuses.status(
        session.deployment.name,
        history,
        {session.host(n).address: [*s.containers, *s.unlabelled] for n, s in states.items()},
        {session.host(n).address: error.unanswered for n, error in away.items()},
        {i.name: i.health for i in instances if i.health not in ("", HEALTHY)},
    )
    hosts = [said[n].look if n in said else _away(session, n, away[n]) for n in names]
    others = _others(states.values(), serving)
    return Look(status, then, history, serving, instances, hosts, others, drift, drift_unknown)


def _others(states: Iterable[HostState], serving: Release | None) -> list[str]:
    ours = (serving.generation, serving.servers) if serving else ()
    return [
        container.name
        for state in states
        for container in state.containers
        if container.status in RUNNING and container.labels.get(GENERATION) not in ours
    ]


def _away(session: Session, name: str, error: PdDeployError) -> HostLook:
    away = f"no answer: {error.message}" if is_transient(error) else error.message
    return HostLook(name, session.host(name).address, away=away)


async def _ask(session: Session, name: str) -> _Said:
    """Ask a host who works there, and its devices for their health and their addresses."""
    host, engine, devices = session.host(name), session.engine, devices_on(session, name)
    entry, addresses = HostLook(name, host.address), Addresses(name, {})
    health = engine.device_health_command(devices) if devices else []
    reading = engine.read_addresses_command(session.deployment, devices) if devices else []
    commands = [lease.look_command(session.root), *filter(None, (health, reading))]
    printed = await or_error(host.outputs(*commands))
    if isinstance(printed, PdDeployError):
        return _Said(replace(entry, devices=f"{NOT_KNOWN}: {printed.message}"), addresses)
    entry = replace(entry, lease=lease.parse_look(printed.pop(0)))
    if health:
        faulty = engine.faulty_devices(printed.pop(0), devices)
        told = "; ".join(f"device {d}: {why}" for d, why in faulty.items()) or HEALTHY
        entry = replace(entry, devices=told)
    if reading:
        try:
            of_device = engine.parse_addresses(printed.pop(0), devices, host=host.where)
            addresses = Addresses(name, of_device)
        except PdDeployError as error:
            entry = replace(entry, devices=error.message)
    return _Said(entry, addresses)


def _drift(
    session: Session,
    history: History,
    choice: Choice,
    states: Sequence[HostState],
    addresses: Sequence[Addresses],
    away: Iterable[str],
) -> tuple[str | None, str]:
    """Say how the hosts differ from what the file makes, "" if they don't; None and why, if that
    can't be told."""
    if history.serving is None:
        return None, UNCOMPARED if history.record.adopted_serving else "nothing serves"
    if choice.digest != history.serving.digest:
        return f"the file has another image, {choice.chosen_image}", ""
    if away:
        return None, f"{', '.join(away)} could not be looked at"
    image = ResolvedImage(choice, history.serving.pinned_image)
    try:
        rollout = surveying.planned(session, states, addresses, image, "a look")
    except PdDeployError as error:
        return None, error.message
    if rollout.plan.generation != history.serving.generation:
        return "the file makes another generation than the one that serves", ""
    hosts = rollout.with_actions(STAGES).hosts.items()
    changes = [f"{a.verb} {a.subject} on {name}" for name, host in hosts for a in host.actions]
    more = f" and {count} more" if (count := len(changes[SHOWN:])) else ""
    return (f"a run would {', '.join(changes[:SHOWN])}{more}" if changes else ""), ""


async def _as_deployed(session: Session, states: Iterable[str], history: History) -> Session:
    """Return the session as it was for what serves, if that can be read; the present one if not."""
    if history.serving is None:
        return session
    hosts = {name: session.host(name) for name in states}
    try:
        saved = await host_records.load(hosts, session.root, history.serving.generation)
        return session.for_deployment(saved.deployment)
    except PdDeployError:
        return session


async def _instances(
    session: Session, states: Mapping[str, HostState], history: History
) -> list[InstanceLook]:
    """Look at all instances and proxies: at their containers, and if they run, by their port."""
    if service := history.record.adopted_serving:
        return await _adopted(session, states, service)
    serving, starts = history.serving, history.record.starts
    found: dict[str, ContainerState] = {}
    for state in states.values():
        if serving:
            by_instance = statuses.containers_of(serving, state.containers)
            for name, containers in by_instance.items():
                running = [c for c in containers if c.status in RUNNING]
                found[name] = (running or containers)[0]
    return await together(
        _instance(
            session,
            name,
            found.get(name),
            starts.get(name),
            _absent(session, name, states, serving),
            _listening(states.get(session.topology.host_of(name))),
        )
        for name in session.topology.names
    )


def _listening(state: HostState | None) -> Collection[int]:
    return state.listening if state else ()


def _absent(session: Session, name: str, states: Collection[str], serving: Release | None) -> str:
    """Say what became of an instance whose container was not seen."""
    return statuses.GONE if serving and session.topology.host_of(name) in states else ""


async def _instance(
    session: Session,
    name: str,
    state: ContainerState | None,
    starts: Starts | None,
    absent: str,
    listening: Collection[int],
) -> InstanceLook:
    topology, member = session.topology, session.topology.instance(name)
    role, devices = (member.role, member.devices) if member else ("proxy", ())
    entry = InstanceLook(name, role, topology.host_of(name), devices)
    if state is None:
        return replace(entry, container=absent)
    entry, host = _of_container(entry, state, starts), session.host_of(name)
    if not state.running:
        return entry
    if member is None:
        proxy = topology.proxy(name)
        health, cause = await _proxy_health(host, proxy.address, proxy.port, listening)
        return replace(entry, health=health, cause=cause)
    return await _of_servers(session, entry, host, member.address, member.api_ports, listening)


async def _adopted(
    session: Session, states: Mapping[str, HostState], service: AdoptedService
) -> list[InstanceLook]:
    """Look at all of an adopted service. A shell keeps each container alive, so what is asked is
    what listened in it when it was adopted."""
    names = {session.host(name).address: name for name in session.deployment.hosts}
    return await together(
        _adopted_instance(session, service, one, name, states.get(name))
        for one in service.containers
        for name in [names.get(one.host, one.host)]
    )


async def _adopted_instance(
    session: Session,
    service: AdoptedService,
    one: AdoptedContainer,
    host_name: str,
    state: HostState | None,
) -> InstanceLook:
    entry = InstanceLook(one.instance, one.role, host_name)
    if state is None:
        return entry
    host, listening = session.host(host_name), state.listening
    found = await or_error(host.docker.states([one.id]))
    if isinstance(found, PdDeployError):
        return replace(entry, health=f"{NOT_KNOWN}: {found.message}", cause="late")
    entry = _of_container(entry, found[0]) if found else replace(entry, container=statuses.GONE)
    if entry.container not in RUNNING:
        return entry
    if one.role == "proxy":
        health, cause = await _proxy_health(host, host.address, service.port_of(one), listening)
        return replace(entry, health=health, cause=cause)
    if one.api_ports or not one.ports or listening.intersection(one.ports):
        return await _of_servers(session, entry, host, host.address, one.api_ports, listening)
    silent = f"nobody listens on {', '.join(map(str, one.ports))}"
    return replace(entry, health=silent, cause="refused")


def _of_container(
    entry: InstanceLook, state: ContainerState, starts: Starts | None = None
) -> InstanceLook:
    """Add what Docker says of an instance's container, and the record of its starts."""
    started_again = state.running and state.finished_at is not None
    uncounted = None if started_again else 0
    return replace(
        entry,
        container=state.status,
        since=state.started_at if state.running else state.finished_at,
        restarts=starts.restarts(state.run) if starts else uncounted,
        started_outside=bool(starts and starts.is_outside(state.run)),
        run=state.run,
    )


async def _of_servers(
    session: Session,
    entry: InstanceLook,
    host: Host,
    address: str,
    ports: Iterable[int],
    listening: Collection[int],
) -> InstanceLook:
    """Add what an instance's API servers say.

    Args:
        listening: the ports on which somebody listens there.
    """
    asked = await together(_server(host, address, port, listening) for port in ports)
    counters, pages = session.engine.COUNTERS, [page for *_, page in asked if page is not None]
    unwell = [(health, cause) for health, cause, _ in asked if cause]
    causes: list[Cause] = [cause for _, cause in unwell] or [""]
    return replace(
        entry,
        health="; ".join(dict.fromkeys(h for h, _ in unwell)) or (HEALTHY if asked else ""),
        cause=min(causes, key=_WORST.index),
        requests=metrics.total(pages, counters.served),
        kv_tokens=metrics.total(pages, counters.kv_tokens) if entry.role == "decode" else None,
    )


async def _server(
    host: Host, address: str, port: int, listening: Collection[int]
) -> tuple[str, Cause, metrics.Samples | None]:
    """Ask an API server for its health and its counters."""
    url = f"http://{address}:{port}"
    try:
        async with host.http(address, port) as client:
            answer = await client.get(f"{url}/health", timeout=ANSWER_TIMEOUT_S)
            if answer.status_code != httpx.codes.OK:
                return f"status {answer.status_code} on its health endpoint", "status", None
            page = await client.get(f"{url}/metrics", timeout=ANSWER_TIMEOUT_S)
            return HEALTHY, "", metrics.parse(page.text) if page.is_success else None
    except (httpx.HTTPError, PdDeployError) as error:
        return *_no_answer(error, is_open=port in listening), None


async def _proxy_health(
    host: Host, address: str, port: int, listening: Collection[int]
) -> tuple[str, Cause]:
    """Ask a proxy for anything: what its /health says of servers, they are asked themselves."""
    try:
        async with host.http(address, port) as client:
            await client.get(f"http://{address}:{port}/health", timeout=ANSWER_TIMEOUT_S)
            return HEALTHY, ""
    except (httpx.HTTPError, PdDeployError) as error:
        return _no_answer(error, is_open=port in listening)


def _no_answer(error: Exception, *, is_open: bool) -> tuple[str, Cause]:
    """Say what came in place of an answer, and of which kind that is.

    Args:
        is_open: whether somebody listens at the port. Who hangs for long has connections that wait
            to be accepted, until no more are made.
    """
    found = error.message if isinstance(error, PdDeployError) else str(error)
    told = f"does not answer ({found or type(error).__name__})"
    if isinstance(error, httpx.TimeoutException):
        told = f"does not answer within {ANSWER_TIMEOUT_S:g} s"
    if isinstance(error, httpx.TimeoutException) and is_open:
        return f"{told}, although its port is open", "silent"
    is_late = isinstance(error, PdDeployError | httpx.TimeoutException)
    return told, "late" if is_late else "refused"
