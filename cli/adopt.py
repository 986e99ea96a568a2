"""`pd-deploy adopt`: what runs under the playbook's names, and taking it over."""

import asyncio
import getpass
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import typer

from pd_deploy.cli.hosts import asking, connected
from pd_deploy.cli.status import ranges
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts import exec_processes
from pd_deploy.importer import running
from pd_deploy.importer.report import hidden, is_secret
from pd_deploy.importer.round_trip import Difference
from pd_deploy.records.adopted import SHOWN, AdoptedService
from pd_deploy.records.releases import History
from pd_deploy.steps import adopting, locking
from pd_deploy.steps.adopting import Seen
from pd_deploy.steps.session import LockedSession, Session


def run(deployment: Deployment, file: Path, named: Sequence[str], *, yes: bool) -> str:
    """Look at a running service, and if told so take it over; return what to print."""
    names = parse_names(deployment, named)
    with asking([deployment]):
        return asyncio.run(adopted(deployment, file, names, yes=yes))


def parse_names(deployment: Deployment, named: Sequence[str]) -> dict[str, list[str]]:
    """Read `--container HOST=NAME`, by host.

    Raises:
        InvalidInput: a host is not the file's, or a name is missing.
    """
    names: dict[str, list[str]] = {}
    problems = []
    for text in named:
        host, _, name = text.partition("=")
        if host in deployment.hosts and name:
            names.setdefault(host, []).append(name)
        else:
            hosts = ", ".join(deployment.hosts)
            expected = f"expected HOST=NAME with a host of the file ({hosts}), found {text!r}"
            problems.append(Problem("--container", expected))
    if problems:
        raise InvalidInput(problems)
    return names


async def adopted(
    deployment: Deployment, file: Path, names: dict[str, list[str]], *, yes: bool
) -> str:
    """Look at a running service, and if told so take it over; see `run`."""
    async with connected(deployment) as reached:
        reached.require_all()
        session = reached.session
        if not yes:
            seen = await adopting.look(session, names)
            return "\n".join(
                [*_shown(session, seen), *_would(session, seen, reached.history, file)]
            )
        who = f"{getpass.getuser()} on {socket.gethostname()}"
        lease = locking.lease_for(session, "`pd-deploy adopt`", "", reached.history.lease)
        locked = LockedSession.of(session, lease)
        async with lease.held(locked.hosts):
            await locking.lock(locked, _say)
            seen = await adopting.look(locked, names)
            service = await adopting.adopt(locked, seen, who)
    return "\n".join(_done(deployment, seen, service, file))


def _say(waiting: str) -> None:
    typer.echo(waiting, err=True)


def _shown(session: Session, seen: Sequence[Seen]) -> Iterator[str]:
    """Show what runs, host by host, and what each has otherwise than the file."""
    processes = {s.instance: list(s.processes) for s in seen if s.role != "proxy"}
    compared = running.differences(session.deployment, processes)
    implied = adopting.implied(session.deployment, session.topology)
    present = {s.instance for s in seen}
    for name in session.deployment.hosts:
        yield f"host {session.host(name).where}"
        for s in (s for s in seen if s.host == name):
            yield f"  {s.state.name}: {s.role} {s.instance}"
            yield from (f"    {line}" for line in _facts(session, s))
            yield from (f"    differs  {line}" for line in _differences(compared, s))
        for container, instance in implied[name].items():
            if instance not in present:
                yield f"  {container}: does not run"
    yield ""


def _facts(session: Session, seen: Seen) -> Iterator[str]:
    digest = f" ({seen.digest.rpartition('@')[2][:19]})" if seen.digest else ""
    yield f"image    {seen.state.image}{digest}"
    started = seen.state.started_at
    yield f"since    {started.astimezone():%Y-%m-%d %H:%M:%S}" if started else "since    not known"
    ports = exec_processes.listened(seen.processes)
    yield f"ports    {', '.join(map(str, ports)) or 'none'}"
    if seen.role != "proxy":
        devices = running.devices_of(seen.processes)
        yield f"devices  {'not told by its environment' if devices is None else ranges(devices)}"
        model = exec_processes.flag(seen.processes, "--model-path", "--model")
        yield f"model    {model or 'not told by its arguments'}"
    words = "; ".join(map(exec_processes.shown, seen.roots))
    yield f"runs     {words or ('its main process' if seen.runs else 'nothing but its shell')}"
    image = session.deployment.image_reference
    if seen.state.image != image:
        yield f"differs  image {seen.state.image} → {image}"
    place = session.topology.instance(seen.instance)
    if place:
        devices = running.devices_of(seen.processes)
        if devices is not None and sorted(devices) != sorted(place.devices):
            yield f"differs  devices {ranges(devices)} → {ranges(place.devices)}"
    elif ports and (port := session.topology.proxy(seen.instance).port) not in ports:
        listed = ", ".join(map(str, ports))
        yield f"differs  port {listed} → {port}"


def _differences(compared: dict[str, list[Difference] | None], seen: Seen) -> Iterator[str]:
    if seen.instance not in compared:
        return
    listed = compared[seen.instance]
    if listed is None:
        yield "not compared: no start_api_servers.py runs in it"
        return
    for key, before, after in listed:
        values = ["none" if v is None else _value(key, v) for v in (before, after)]
        yield f"{key} {values[0]} → {values[1]}"


def _value(key: str, value: object) -> str:
    return "(not shown)" if is_secret(key, value) else hidden(str(value), names=False)


def inexact(seen: Iterable[Seen]) -> list[str]:
    """Say what can't be brought back as it was, each once."""
    said: dict[str, list[str]] = {}
    for s in seen:
        for process in s.roots:
            for what in exec_processes.inexact(process):
                said.setdefault(f"{exec_processes.shown(process)}: {what}", []).append(s.state.name)
        for process in exec_processes.attended(s.processes):
            what = f"{exec_processes.shown(process)}: it has a terminal, and is not started again"
            said.setdefault(what, []).append(s.state.name)
    return [f"  {', '.join(dict.fromkeys(names))}: {what}" for what, names in said.items()]


def _would(session: Session, seen: Sequence[Seen], history: History, file: Path) -> Iterator[str]:
    """Say what adopting would do."""
    if history.record.serving:
        yield f"generation {history.record.serving} serves: there is nothing left to take over"
        return
    try:
        adopting.service_of(session, seen, "")
    except InvalidInput as error:
        yield "This can't be taken over:"
        yield from (f"  {problem}" for problem in error.problems)
        return
    names = ", ".join(s.state.name for s in seen)
    yield "Nothing was changed."
    yield f"`pd-deploy adopt {file} --yes` enters this as generation {SHOWN}:"
    yield f"  the first deployment stops {names} at its cut-over, and keeps them;"
    yield "  if it fails, they are started again, and in them what runs there now."
    if lines := inexact(seen):
        yield "Not exactly as it was, on the way back:"
        yield from lines


def _done(
    deployment: Deployment, seen: Sequence[Seen], service: AdoptedService, file: Path
) -> Iterator[str]:
    yield (
        f"{deployment.name}: generation {SHOWN} is {len(service.containers)} containers, port "
        f"{service.port}; nothing of it was touched"
    )
    if lines := inexact(seen):
        yield "Not exactly as it was, on the way back:"
        yield from lines
    yield f"Next: pd-deploy plan {file}, pd-deploy deploy {file}"
