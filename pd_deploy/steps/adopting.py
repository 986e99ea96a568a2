"""Taking over a service that somebody else has started, and bringing it back.

Its containers carry no label of ours. They are touched only by id and name as they were adopted;
what is in them is touched by commands that run there.
"""

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
from pydantic import TypeAdapter, ValidationError

from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.errors import (
    ContainerMissing,
    FactsError,
    InstanceDied,
    InUse,
    InvalidInput,
    NotOurs,
    NotReady,
    OutOfOrder,
    Problem,
)
from pd_deploy.hosts import exec_processes
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.container_values import DEPLOYMENT_LABEL, Adopted, ContainerState
from pd_deploy.hosts.exec_processes import Process
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host
from pd_deploy.records import adopted
from pd_deploy.records.adopted import AdoptedContainer, AdoptedService
from pd_deploy.steps import copies, host_records
from pd_deploy.steps.asking import promptly
from pd_deploy.steps.report import Report
from pd_deploy.steps.session import LockedSession, Session, host_accesses
from pd_deploy.steps.stopping import told_of

SERVERS_END_S = 10  # nobody asks them any more: their proxy has ended
CONNECT_S = 5.0
POLL_S = 1.0
LOOK_EVERY = 5  # polls for a look at the processes, which costs more than one at a port
LOG_LINES = 20
_PROCESSES = TypeAdapter(list[Process])


@dataclass(frozen=True)
class Seen:
    """A container that runs under one of the expected names, and what is in it.

    Attributes:
        host: its host's name in the file.
        digest: of its image, as the host knows it; empty if it never saw a registry.
        role, pod: empty for a container that can't be told; a proxy is part of no pod.
    """

    instance: str
    role: str
    pod: str
    host: str
    address: str
    state: ContainerState
    processes: tuple[Process, ...]
    digest: str = ""

    @property
    def roots(self) -> list[Process]:
        """What is started again on the way back."""
        return exec_processes.roots(self.processes)

    @property
    def runs(self) -> bool:
        """Whether anything but a shell runs in it."""
        return bool(self.roots) or exec_processes.runs_by_itself(self.processes)

    @property
    def container(self) -> AdoptedContainer:
        """What the record keeps of it."""
        return AdoptedContainer(
            instance=self.instance,
            role=self.role,
            pod=self.pod,
            host=self.address,
            name=self.state.name,
            id=self.state.id,
            image=self.state.image,
            ports=tuple(exec_processes.listened(self.processes)),
            api_ports=tuple(exec_processes.api_ports(self.processes)),
        )


def implied(deployment: Deployment, topology: Topology) -> dict[str, dict[str, str]]:
    """List the names that the playbook gives the file's containers, with the instance of each, by
    host: `<container.names.ROLE>_<instance>`."""
    names = deployment.container.names
    implied: dict[str, dict[str, str]] = {host: {} for host in deployment.hosts}
    for i in topology.instances:
        implied[i.host][f"{getattr(names, i.role)}_{i.name}"] = i.name
    for proxy in topology.proxies:
        implied[proxy.host][f"{names.proxy}_{proxy.name}"] = proxy.name
    return implied


async def look(session: Session, named: Mapping[str, Collection[str]] | None = None) -> list[Seen]:
    """Look at what runs under the names that the file implies; nothing is changed.

    Args:
        named: further names, by host. Their instance is told by the ports that they listen on.

    Raises:
        InvalidInput: a name of `named` is not there, or does not tell which instance it is.
        NotOurs: a deployment of ours has made one of the containers.
    """
    names = implied(session.deployment, session.topology)
    looks = await together(
        promptly(session.host(host), _look(session, host, of_host, (named or {}).get(host, ())))
        for host, of_host in names.items()
    )
    seen = [each for of_host in looks for each in of_host]
    problems = [
        Problem("--container", f"expected a container that runs, found none: {host}={name}")
        for host, given in (named or {}).items()
        for name in given
        if (host, name) not in {(s.host, s.state.name) for s in seen}
    ]
    problems += [
        Problem(
            "--container",
            f"expected {s.host}={s.state.name} to listen on a port that the file gives an instance "
            f"of that host, found {_ports(s) or 'that it listens on none'}",
        )
        for s in seen
        if not s.instance
    ]
    by_instance: dict[str, list[str]] = {}
    for s in seen:
        by_instance.setdefault(s.instance, []).append(f"{s.host}={s.state.name}")
    problems += [
        Problem("--container", f"expected one container of {name}, found {', '.join(several)}")
        for name, several in by_instance.items()
        if name and len(several) > 1
    ]
    if problems:
        raise InvalidInput(problems)
    return seen


def _ports(seen: Seen) -> str:
    return ", ".join(map(str, exec_processes.listened(seen.processes)))


async def _look(
    session: Session, name: str, expected: Mapping[str, str], named: Collection[str]
) -> list[Seen]:
    host = session.host(name)
    listed = [c for c in await host.docker.listed() if c.name in {*expected, *named}]
    for container in listed:
        if owner := container.labels.get(DEPLOYMENT_LABEL):
            raise NotOurs(
                f"expected a container that the playbook has started, found that "
                f"{container.name} is of deployment {owner}",
                host=host.where,
                hint=f"pd-deploy has made it: `pd-deploy status` of {owner}'s file shows it",
            )
    running = [c for c in listed if c.status == "running"]
    states = await host.docker.states(c.id for c in running)
    return await together(_seen(session, name, expected.get(s.name, ""), s) for s in states)


async def _seen(session: Session, name: str, instance: str, state: ContainerState) -> Seen:
    host = session.host(name)
    processes = await _processes(host, state.id, Adopted(state.id, state.name))
    image = await host.docker.image(state.image_id)
    instance = instance or _by_port(session.topology, name, exec_processes.listened(processes))
    place = session.topology.instance(instance)
    role = place.role if place else "proxy" if instance else ""
    pod = place.pod if place else ""
    digest = image.digest or "" if image else ""
    if image and not digest:
        reference = await host.docker.image(state.image)
        digest = (reference.digest or "") if reference and reference.id == image.id else ""
    return Seen(instance, role, pod, name, host.address, state, tuple(processes), digest)


def _by_port(topology: Topology, host: str, ports: Iterable[int]) -> str:
    """Tell an instance by the ports that the file gives it."""
    listened = set(ports)
    for i in topology.on_host(host):
        if listened & set(i.ports.values()):
            return i.name
    proxies = topology.proxies_on(host)
    return next((proxy.name for proxy in proxies if proxy.port in listened), "")


async def _processes(host: Host, container: str, owner: Adopted) -> list[Process]:
    printed: list[bytes] = []
    command = ["sh", "-c", exec_processes.READ]
    code = await host.docker.execute(
        container, command, lambda out, _: printed.append(out), deployment=owner
    )
    try:
        return exec_processes.parse(b"".join(printed).decode())
    except (ValueError, LookupError) as error:
        # Not what was printed: it holds environments.
        raise FactsError(
            f"expected the processes of container {owner.name}, found exit code {code} and a list "
            "that can't be read",
            host=host.where,
            hint="it needs sh, sed, ls, tr, base64 and readlink",
        ) from error


def service_of(session: Session, seen: Sequence[Seen], by: str) -> AdoptedService:
    """Make the record's entry of what was seen.

    Raises:
        InvalidInput: it is not a whole service: no proxy, no prefill or no decode that runs.
    """
    containers = tuple(s.container for s in seen)
    problems = [
        Problem(
            role,
            f"expected a container of the playbook's with a {role} in it, under a name of "
            "`container.names` or of --container; found none",
        )
        for role in ("prefill", "decode", "proxy")
        if not any(s.role == role and s.runs for s in seen)
    ]
    proxies = [s for s in seen if s.role == "proxy"]
    ports = [exec_processes.listened(s.processes) for s in proxies]
    problems += [
        Problem(f"proxy.{s.instance}", "expected it to listen on a port, found none")
        for s, listened in zip(proxies, ports, strict=True)
        if not listened
    ]
    if problems:
        raise InvalidInput(problems)
    wanted = session.topology.proxy(proxies[0].instance).port
    processes = [p for s in seen for p in s.processes]
    model = exec_processes.flag(processes, "--served-model-name", "--model-path")
    return AdoptedService(
        when=datetime.now(UTC),
        by=by,
        containers=containers,
        port=wanted if wanted in ports[0] else ports[0][0],
        model=model or session.deployment.model.served_name,
    )


async def adopt(session: LockedSession, seen: Sequence[Seen], by: str) -> AdoptedService:
    """Enter a running service into the deployment's record as generation 0; touch none of it.

    What its processes were started with goes to their own host, readable by root alone.

    Raises:
        OutOfOrder: a generation of the deployment serves.
    """
    record = await copies.read_record(session)
    if record.serving:
        raise OutOfOrder(
            f"expected that nothing of {session.deployment.name} serves yet, found generation "
            f"{record.serving}",
            hint="there is nothing left to take over; `pd-deploy status FILE` shows what serves",
        )
    service = service_of(session, seen, by)
    await together(_keep(session, s) for s in seen)
    record = record.on(host_accesses(session.deployment).values()).adopting(service)
    await copies.write_record(session, copies.hosts_in_order(session), record)
    return service


async def _keep(session: LockedSession, seen: Seen) -> None:
    host = session.host(seen.host)
    await session.may_change(host)
    content = _PROCESSES.dump_json(list(seen.roots), indent=1)
    file = File(content, host_records.PRIVATE)
    await host.write_files({f"{session.root}/{seen.container.file}": file}, dir_mode=0o700)


def host_of(session: Session, container: AdoptedContainer) -> Host:
    """Return a container's host.

    Raises:
        OutOfOrder: it has left the file.
    """
    for host in session.hosts.values():
        if host.address == container.host:
            return host
    raise OutOfOrder(
        f"expected the host {container.host} of {container.name} in the file, found that it has "
        "left it",
        hint="put it back into the file",
    )


async def stop(session: LockedSession, container: AdoptedContainer) -> int:
    """Stop a container of the adopted service, and keep it. nginx first answers what it was asked,
    for at most as long as a proxy of ours may.

    Returns:
        How many requests of clients that has cut.
    """
    host = host_of(session, container)
    try:
        if not (await host.docker.inspect(container.id)).running:
            return 0
    except ContainerMissing:
        return 0
    processes = exec_processes.roots(await _processes(host, container.id, container.handle))
    of = session.deployment
    seconds = of.drain if container.role == "proxy" else of.container.stop_timeout
    if container.role != "proxy":
        seconds = min(seconds, SERVERS_END_S)
    cut = 0
    # The launcher ends its servers on SIGINT alone.
    for signal, chosen in (
        ("QUIT", [p for p in processes if p.is_nginx]),
        ("INT", [p for p in processes if not p.is_nginx]),
    ):
        if not chosen:
            continue
        await session.may_change(host)
        command = exec_processes.end_command(chosen, signal, seconds)
        left = await host.docker.execute(
            container.id, command, lambda *_: None, deployment=container.handle
        )
        if left and container.role == "proxy":
            asking = (host.facts.connections(port) for port in container.ports)
            cut += sum(map(len, await together(asking)))
    await session.may_change(host)
    # A shell in front of a terminal takes no notice of SIGTERM.
    timeout = 0 if processes else seconds
    await host.docker.stop(container.id, deployment=container.handle, timeout=timeout)
    return cut


async def stop_all(session: LockedSession, service: AdoptedService) -> Report:
    """Stop the adopted service, proxies first."""
    cut = 0
    for group in (service.proxies, service.servers):
        cut += sum(await together(stop(session, container) for container in group))
    name = session.deployment.name
    return Report("stop adopted", name, "", True, told_of(cut, session) or "stopped, and kept")


async def is_whole(session: Session, service: AdoptedService) -> bool:
    """Tell whether all of the adopted service runs: containers, processes and ports."""
    return all(await together(_runs(session, c, service) for c in service.containers))


async def _runs(session: Session, container: AdoptedContainer, service: AdoptedService) -> bool:
    host = host_of(session, container)
    try:
        if not (await host.docker.inspect(container.id)).running:
            return False
    except ContainerMissing:
        return False
    if not _all_there(await _kept(session, container), await _processes_of(host, container)):
        return False
    is_proxy = container.role == "proxy"
    ports = (service.port_of(container),) if is_proxy else container.api_ports
    return all(await together(_answers(host, number) for number in ports))


def _all_there(kept: Iterable[Process], now: Collection[Process]) -> bool:
    return all(exec_processes.runs_again(process, now) for process in kept)


async def _processes_of(host: Host, container: AdoptedContainer) -> list[Process]:
    return await _processes(host, container.id, container.handle)


async def start(session: LockedSession, service: AdoptedService, name: str) -> Report:
    """Start a container of the adopted service, and what was started in it.

    Raises:
        ContainerMissing: somebody has removed it.
        InUse: its ports are not free within `gates.free`.
    """
    container = next(c for c in service.containers if c.name == name)
    host = host_of(session, container)
    state = await host.docker.inspect(container.id)
    if not state.running:
        await _until_free(session, host, container)
        await session.may_change(host)
        await host.docker.start(container.id)
    kept = await _kept(session, container)
    now = await _processes_of(host, container)
    inherited = exec_processes.known_environment(p for p in now if p.pid == exec_processes.MAIN)
    started = [p for p in kept if not exec_processes.runs_again(p, now)]
    for process in started:
        await session.may_change(host)
        await host.docker.spawn(
            container.id,
            exec_processes.start_command(process, inherited),
            deployment=container.handle,
            environment=process.environment or {},
            directory=process.directory,
        )
    shown = ", ".join(map(exec_processes.shown, started)) or "nothing: all runs"
    return Report("start again", name, host.name, bool(started), f"started {shown}")


async def _until_free(session: Session, host: Host, container: AdoptedContainer) -> None:
    """Wait until nobody has a container's ports: the launcher takes none on which connections of
    the server before are still in TIME_WAIT, which lasts a minute; nginx does."""
    limit, begin = session.deployment.gates.free, time.monotonic()
    is_proxy = container.role == "proxy"
    while taken := await host.facts.ports_taken(container.ports, reused=is_proxy):
        if time.monotonic() - begin >= limit:
            shown = ", ".join(f"port {p} with {who}" for p, who in sorted(taken.items()))
            raise InUse(
                f"expected the ports of {container.name} to be free within {limit:g} s, found "
                f"{shown}",
                host=host.where,
                hint="stop what uses them, or raise gates.free",
            )
        await asyncio.sleep(POLL_S)


async def missing_of(session: Session, container: AdoptedContainer) -> FactsError | None:
    """Find out what a container that runs would lack to be brought back after it was stopped."""
    try:
        await _kept(session, container)
    except FactsError as fault:
        fault.hint = "it still runs: enter it again by `pd-deploy adopt FILE --yes`"
        return fault
    return None


async def _kept(session: Session, container: AdoptedContainer) -> list[Process]:
    """Read what was started in a container.

    Raises:
        FactsError: the file is not there, or is damaged.
    """
    host, path = host_of(session, container), f"{session.root}/{container.file}"
    content = await host.read_file(path)
    try:
        return _PROCESSES.validate_json(content or b"")
    except ValidationError:
        # Not why: the text of that has values in it, which may be secrets.
        raise FactsError(
            f"expected {path} as `pd-deploy adopt` wrote it, found "
            f"{'something else' if content else 'no such file'}",
            host=host.where,
            hint="start the old service by its own means, and adopt it again",
        ) from None


async def until_ready(session: Session, service: AdoptedService, name: str) -> Report:
    """Wait until the servers in a container answer.

    Raises:
        InstanceDied: what was started there has ended.
        NotReady: they don't within `gates.ready`.
    """
    container = next(c for c in service.containers if c.name == name)
    host, limit, begin = (
        host_of(session, container),
        session.deployment.gates.ready,
        time.monotonic(),
    )
    for poll in range(1, 1 << 31):
        if all(await together(_answers(host, port) for port in container.api_ports)):
            break
        if poll % LOOK_EVERY == 0:
            kept = await _kept(session, container)
            if not _all_there(kept, await _processes_of(host, container)):
                raise InstanceDied(
                    f"expected what was started in {name} to run on, found that it has ended"
                    f"\n{await _last_lines(host, kept)}",
                    host=host.where,
                    instance=container.instance,
                )
        if time.monotonic() - begin >= limit:
            raise NotReady(
                f"expected {name} to answer at {', '.join(map(str, container.api_ports))} within "
                f"{limit:g} s\n{await _last_lines(host, await _kept(session, container))}",
                host=host.where,
                instance=container.instance,
            )
        await asyncio.sleep(POLL_S)
    return Report("ready again", name, host.name, False, "answers")


async def _last_lines(host: Host, processes: Iterable[Process]) -> str:
    """Read the end of what processes have printed; their files are mounted, as a rule."""
    files = {p.output for p in processes if not p.output.startswith("/dev/")}
    tails = await host.facts.tail(sorted(files), lines=LOG_LINES)
    lines = []
    for path, text in tails.items():
        lines += [f"  {path}:", *(f"  | {line}" for line in text.splitlines())]
    return "\n".join(lines)


async def _answers(host: Host, port: int) -> bool:
    """Tell whether somebody takes requests at a port of a host; a proxy knows no /health."""
    async with host.http(host.address, port) as client:
        try:
            answer = await client.get(f"http://{host.address}:{port}/health", timeout=CONNECT_S)
        except httpx.TransportError:
            return False
        return answer.status_code in (200, 404)


async def remove(session: LockedSession, service: AdoptedService, name: str) -> Report:
    """Remove the adopted service's containers on a host, and what was kept of their processes."""
    host = session.host(name)
    here = [c for c in service.containers if c.host == host.address]
    for container in here:
        await session.may_change(host)
        await host.docker.remove(container.id, deployment=container.handle, force=True)
    await session.may_change(host)
    await host.remove_tree(f"{session.root}/{adopted.DIRECTORY}", below=session.root)
    removed = ", ".join(c.name for c in here)
    detail = f"removed {removed}" if removed else "nothing to remove"
    return Report("prune adopted", name, name, bool(here), detail)
