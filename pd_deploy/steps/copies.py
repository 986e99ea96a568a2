"""The copies of a deployment's past: each of its hosts has the record, and what brings its kept
generations back. A copy that is lost or late is written again by the next run of any kind."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

from pd_deploy.errors import LeaseLost, OnHold, PdDeployError
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host
from pd_deploy.records.releases import PLAN, RELEASE, History, Record
from pd_deploy.steps import host_records
from pd_deploy.steps.host_records import HostRecords
from pd_deploy.steps.retry import retried
from pd_deploy.steps.session import LockedSession, Session

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


async def change_record(session: LockedSession, change: Callable[[Record], Record]) -> Record:
    """Change the record as the hosts have it now, on all of them; return the new one."""
    before = await read_record(session)
    record = change(before)
    if record is not before:
        await write_record(session, hosts_in_order(session), record)
    return record


async def read_record(session: LockedSession) -> Record:
    """Read the record as the hosts have it now: of their copies the newest one."""
    return host_records.merged((await read(session)).values()).record


def hosts_in_order(session: LockedSession, besides: Collection[str] = ()) -> list[Host]:
    """List the hosts that get the record, its home first, which counts.

    Args:
        besides: addresses of hosts that get none.
    """
    first = session.host(session.topology.home)
    others = [h for h in session.hosts.values() if h is not first and h.address not in besides]
    return [first, *others]


async def complete(session: LockedSession) -> list[str]:
    """Write again what a host has lost of the deployment's past, where another host has it.

    Returns:
        The files written, each with its host.

    Raises:
        OnHold: somebody keeps all runs from working on the deployment.
    """
    records_of = await read(session)
    history = host_records.merged(records_of.values())
    require_no_hold(session, history)
    hosts = [n for n, host in session.hosts.items() if host.address in history.record.hosts]
    outcomes = await asyncio.gather(
        *(_complete(session, name, records_of, history) for name in hosts), return_exceptions=True
    )
    _faults([session.host(name) for name in hosts], outcomes)
    return [path for written in outcomes if isinstance(written, list) for path in written]


async def read(session: LockedSession) -> dict[str, HostRecords]:
    """Read what each host knows of the deployment's past, now that nobody else changes it."""
    names = list(session.hosts)
    reading = (
        retried(partial(host_records.read, session.host(name), session.root)) for name in names
    )
    return dict(zip(names, await together(reading), strict=True))


def require_no_hold(session: Session, history: History) -> None:
    """Refuse to go on while somebody keeps all runs from working on the deployment.

    Raises:
        OnHold: somebody does.
    """
    if hold := history.record.hold:
        raise OnHold(
            f"expected to be allowed to work on {session.deployment.name}, found it held by {hold}",
            hint="`pd-deploy lock release FILE` lets runs work on it again",
        )


async def _complete(
    session: LockedSession, name: str, records_of: Mapping[str, HostRecords], history: History
) -> list[str]:
    host, root, mine = session.host(name), session.root, records_of[name]
    written = []
    if mine.record.sequence < history.record.sequence:
        await _put_record(session, host, history.record)
        written.append(f"record.json on {name}")
    recorded = {release.generation for release in mine.releases}
    for generation in sorted(history.kept(session.deployment.keep) & history.releases.keys()):
        release = history.releases[generation]
        if host.address not in {access.address for access in release.hosts.values()}:
            continue
        if generation not in mine.plans and (
            saved := await _saved(session, generation, records_of)
        ):
            path = f"{root}/{generation}/{PLAN}"
            await _put(session, host, path, saved)
            written.append(f"{generation}/{PLAN} on {name}")
        if generation not in recorded:
            path = f"{root}/{generation}/{RELEASE}"
            await _put(session, host, path, release.model_dump_json(indent=1).encode())
            written.append(f"{generation}/{RELEASE} on {name}")
    if not mine.reserve:
        await session.may_change(host)
        await host_records.keep_reserve(host, root)
    return written


async def _saved(
    session: LockedSession, generation: str, records_of: Mapping[str, HostRecords]
) -> bytes | None:
    """Read a generation's saved plan from a host that has it."""
    path = f"{session.root}/{generation}/{PLAN}"
    for name, records in records_of.items():
        if generation in records.plans:
            return await retried(partial(session.host(name).read_file, path))
    return None


async def _put_record(session: LockedSession, host: Host, record: Record) -> None:
    async def put() -> None:
        await session.may_change(host)
        await host_records.write_record(host, session.root, record)

    await retried(put)


async def _put(session: LockedSession, host: Host, path: str, content: bytes) -> None:
    async def put() -> None:
        await session.may_change(host)
        await host.write_files({path: File(content, host_records.PRIVATE)})

    await retried(put)


def _faults(hosts: Iterable[Host], outcomes: Iterable[object]) -> dict[str, PdDeployError]:
    """Collect and log the faults of hosts that got no copy; raise what is no host's fault."""
    faults = {}
    for host, outcome in zip(hosts, outcomes, strict=True):
        if not isinstance(outcome, BaseException):
            continue
        if not isinstance(outcome, PdDeployError) or isinstance(outcome, LeaseLost):
            raise outcome
        log.warning("the next run will write the deployment's history again: %s", outcome)
        faults[host.name] = outcome
    return faults
