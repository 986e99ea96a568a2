"""The copies of a deployment's past: each of its hosts has the record, and what brings its kept
generations back. A copy that is lost or late is written again by the next run of any kind."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from functools import partial

from pd_deploy.errors import LeaseLost, PdDeployError
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host
from pd_deploy.records.releases import PLAN, RELEASE, History, Record
from pd_deploy.steps import history
from pd_deploy.steps.history import HostRecords
from pd_deploy.steps.retry import retried
from pd_deploy.steps.session import LockedSession

log = logging.getLogger(__name__)


async def write_record(
    session: LockedSession, hosts: Iterable[Host], record: Record
) -> dict[str, PdDeployError]:
    """Write the record on hosts, the first one, which counts, before the others.

    Returns:
        By host, why it has no copy. The next run writes it; the first host's fault is raised.
    """
    first, *others = hosts
    await _put_record(session, first, record)
    outcomes = await asyncio.gather(
        *(_put_record(session, host, record) for host in others), return_exceptions=True
    )
    return _faults(others, outcomes)


async def complete(session: LockedSession) -> list[str]:
    """Write again what a host has lost of the deployment's past, where another host has it.

    Returns:
        The files written, each with its host.
    """
    names = list(session.hosts)
    known = dict(
        zip(
            names,
            await together(
                retried(partial(history.read, session.host(name), session.root)) for name in names
            ),
            strict=True,
        )
    )
    past = history.merged(known.values())
    hosts = [name for name in names if session.host(name).address in past.record.hosts]
    outcomes = await asyncio.gather(
        *(_complete(session, name, known, past) for name in hosts), return_exceptions=True
    )
    _faults([session.host(name) for name in hosts], outcomes)
    return [path for written in outcomes if isinstance(written, list) for path in written]


async def _complete(
    session: LockedSession, name: str, known: Mapping[str, HostRecords], past: History
) -> list[str]:
    host, root, mine = session.host(name), session.root, known[name]
    written = []
    if mine.record.sequence < past.record.sequence:
        await _put_record(session, host, past.record)
        written.append(f"record.json on {name}")
    here = {release.generation for release in mine.releases}
    for generation in sorted(past.kept(session.deployment.keep) & past.releases.keys()):
        release = past.releases[generation]
        if host.address not in {place.address for place in release.hosts.values()}:
            continue
        if generation not in mine.plans and (saved := await _saved(session, generation, known)):
            path = f"{root}/{generation}/{PLAN}"
            await _put(session, host, path, saved)
            written.append(f"{generation}/{PLAN} on {name}")
        if generation not in here:
            path = f"{root}/{generation}/{RELEASE}"
            await _put(session, host, path, release.model_dump_json(indent=1).encode())
            written.append(f"{generation}/{RELEASE} on {name}")
    if not mine.reserve:
        await session.may_change(host)
        await history.keep_reserve(host, root)
    return written


async def _saved(
    session: LockedSession, generation: str, known: Mapping[str, HostRecords]
) -> bytes | None:
    """Read a generation's saved plan from a host that has it."""
    path = f"{session.root}/{generation}/{PLAN}"
    for name, records in known.items():
        if generation in records.plans:
            return await retried(partial(session.host(name).read_file, path))
    return None


async def _put_record(session: LockedSession, host: Host, record: Record) -> None:
    async def put() -> None:
        await session.may_change(host)
        await history.write_record(host, session.root, record)

    await retried(put)


async def _put(session: LockedSession, host: Host, path: str, content: bytes) -> None:
    async def put() -> None:
        await session.may_change(host)
        await host.write_files({path: File(content, history.PRIVATE)})

    await retried(put)


def _faults(hosts: Iterable[Host], outcomes: Iterable[object]) -> dict[str, PdDeployError]:
    """Collect and log the faults of hosts that got no copy; raise what is no host's fault."""
    faults = {}
    for host, outcome in zip(hosts, outcomes, strict=True):
        if not isinstance(outcome, BaseException):
            continue
        if not isinstance(outcome, PdDeployError) or isinstance(outcome, LeaseLost):
            raise outcome
        log.warning("the next run writes the deployment's past again: %s", outcome)
        faults[host.name] = outcome
    return faults
