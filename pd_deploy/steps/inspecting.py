"""Asking hosts what they are like, and trying their ways to each other. Changes nothing, leaves
nothing behind.

Of a host's tools, none is needed: one that is missing or prints what nobody understands is a
warning.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from pd_deploy.engines.device_report import Ping
from pd_deploy.hosts import batch, facts, machine, reach
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.host import Host
from pd_deploy.planning import flaws, peers
from pd_deploy.planning.flaws import Flaw, HostAnswers
from pd_deploy.steps.session import Session

QUICK_S, FULL_S = 20, 60
"""How long a host's tools may take."""
PING_S = 60
PARTS_S = 300
GIB = 1 << 30
CHUNK_BYTES = 16 * GIB
CHUNK_S = 1800


async def inspect(session: Session, name: str, *, full: bool = False) -> HostAnswers:
    """Ask a host for its clock, memory, devices and model files, in one command.

    Args:
        full: whether to ask what takes longer, too.
    """
    host, tools = session.host(name), session.engine.device_tools(session.deployment)
    devices, directory = devices_on(session, name), session.deployment.model.path
    first = [*machine.COMMANDS]
    first += machine.model_commands(directory) if session.topology.on_host(name) else ()
    first += [facts.LISTENERS] if full else ()
    of_all, of_each = tools.lanes(devices, full=full) if tools else ([], [])
    limit = FULL_S if full else QUICK_S
    command = batch.command([*first, *of_all], of_each, limit, [machine.DATE_LAST])
    before = now()
    printed = batch.parse(await _output(host, command, limit))
    after = now()
    said = machine.parse(printed, host.address)
    clock = (said.last - after, said.first - before) if said.first and said.last else None
    listeners = batch.of(printed, facts.LISTENERS).text.strip() if full else ""
    return HostAnswers(
        name,
        host.where,
        said,
        tools.parse(printed, devices, full=full) if tools else None,
        machine.parse_model(printed, directory) if session.topology.on_host(name) else None,
        clock,
        listening=frozenset(facts.parse_listeners(listeners, host.where)),
    )


def now() -> float:
    """Return the date by the controller's clock, in seconds as hosts say it."""
    return time.time()


def devices_on(session: Session, name: str) -> list[int]:
    """List the devices that the service uses on a host."""
    return sorted(d for instance in session.topology.on_host(name) for d in instance.devices)


async def try_ways(session: Session, ports: Mapping[str, Sequence[int]]) -> list[Flaw]:
    """Let hosts call each other's ports, at which they listen meanwhile.

    Args:
        ports: by host, those at which nothing listens now.
    """
    hosts = {name: session.host(name) for name in ports}
    called = peers.neighbours(list(hosts), {p.host for p in session.topology.proxies})
    of_host = peers.calls(called, ports)
    calls = {n: [(hosts[other].address, port) for other, port in of_host[n]] for n in hosts}
    received: dict[str, dict[int, int]] = {name: {} for name in hosts}
    for name in hosts:
        for other, port in of_host[name]:
            received[other][port] = received[other].get(port, 0) + 1
    if not any(calls.values()):
        return []
    limit = reach.WINDOW_S + 10
    printed = await together(
        _output(host, reach.command(host.address, received[name], calls[name]), limit)
        for name, host in hosts.items()
    )
    answers = {name: reach.parse(text) for name, text in zip(hosts, printed, strict=True)}
    where = {name: host.where for name, host in hosts.items()}
    return flaws.unreached(where, calls, answers, {h.address: n for n, h in hosts.items()})


async def ping_devices(session: Session, answers: Sequence[HostAnswers]) -> list[Flaw]:
    """Let each host's devices call one device each of its neighbours."""
    tools, by_name = session.engine.device_tools(session.deployment), {a.name: a for a in answers}
    if tools is None:
        return []
    pings = pings_of(by_name)

    async def of(name: str) -> list[Flaw]:
        host, lanes = session.host(name), tools.ping_lanes(pings[name])
        command = batch.command([], lanes, PING_S)
        printed = batch.parse(await _output(host, command, PING_S))
        return flaws.lost_pings(host.where, tools.lost(printed, pings[name]))

    found = await together(of(name) for name in pings if pings[name])
    return [flaw for of_host in found for flaw in of_host]


def pings_of(answers: Mapping[str, HostAnswers]) -> dict[str, list[Ping]]:
    """Choose who calls whom: each device one of each of the host's two neighbours, by each network
    that both have."""
    names = [name for name, a in answers.items() if a.devices and a.devices.devices]
    pings: dict[str, list[Ping]] = {name: [] for name in names}
    for place, name in enumerate(names):
        around = dict.fromkeys(names[(place + step) % len(names)] for step in (1, -1))
        for other in (o for o in around if o != name):
            report, theirs = answers[name].devices, answers[other].devices
            if report and theirs:
                devices = list(theirs.devices.values())
                for index, number in enumerate(report.devices):
                    to = devices[index % len(devices)]
                    if to.address:
                        pings[name].append(Ping(number, to.address, other))
                    if report.has_super_node and to.virtual_address:
                        pings[name].append(Ping(number, to.virtual_address, other, within=True))
    return pings


async def compare_parts(
    session: Session,
    answers: Sequence[HostAnswers],
    full_hashes: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[HostAnswers]:
    """Add digests of the model's large files: of their ends or, with `full_hashes`, of all of them.

    Args:
        on_progress: told how far each host is.
    """
    directory = session.deployment.model.path

    async def of(answer: HostAnswers) -> HostAnswers:
        if answer.model is None or not answer.model.sizes:
            return answer
        host = session.host(answer.name)
        if full_hashes:
            parts = await _full_digests(host, directory, answer.model.sizes, on_progress)
        else:
            command = batch.command([machine.parts_command(directory)], limit=PARTS_S)
            printed = batch.parse(await _output(host, command, PARTS_S))
            parts = machine.parse_digests(
                batch.of(printed, machine.parts_command(directory)).text, directory
            )
        return replace(answer, parts=parts)

    return await together(map(of, answers))


async def _full_digests(
    host: Host, directory: str, sizes: Mapping[str, int], on_progress: Callable[[str], None]
) -> dict[str, str]:
    """Digest all files of a host, some GiB at a time."""
    digests: dict[str, str] = {}
    for chunk in _chunks(sizes):
        argv = ["sha256sum", *(f"{directory}/{path}" for path in chunk)]
        done = await host.run(argv, check=False, timeout=CHUNK_S)
        digests |= machine.parse_digests(done.stdout, directory)
        read = sum(sizes[path] for path in digests if path in sizes)
        percent = 100 * read // max(sum(sizes.values()), 1)
        on_progress(f"{host.where}: {len(digests)} of {len(sizes)} files, {percent} %")
    return digests


def _chunks(sizes: Mapping[str, int]) -> Iterable[list[str]]:
    chunk: list[str] = []
    total = 0
    for path, size in sorted(sizes.items()):
        if chunk and total + size > CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(path)
        total += size
    if chunk:
        yield chunk


async def _output(host: Host, argv: Sequence[str], limit: float) -> str:
    """Return what a command prints, however it ends."""
    return (await host.run(argv, check=False, timeout=limit + 20)).stdout
