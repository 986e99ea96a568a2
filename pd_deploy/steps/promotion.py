"""Recording what is attempted, what serves and what failed, on the hosts."""

import asyncio
import logging
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from functools import partial

from pd_deploy.errors import (
    BenchmarkFailed,
    InstanceDied,
    LeaseLost,
    NotReady,
    PdDeployError,
    SmokeTestFailed,
    faults_of,
    headline,
)
from pd_deploy.hosts.concurrent import all_ended, together
from pd_deploy.planning import differences
from pd_deploy.records.releases import Outcome, Quarantined, Record, Result, digest_of, local_tag
from pd_deploy.steps import containers, copies, host_faults, host_records
from pd_deploy.steps.report import Report
from pd_deploy.steps.retry import retried
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import LockedSession

NOTE_S = 10.0  # a run that has failed does not wait longer to say so on the hosts

log = logging.getLogger(__name__)

# Faults of the service itself; those of hosts, network or registry say nothing about an image.
_OF_THE_SERVICE = (BenchmarkFailed, InstanceDied, NotReady, SmokeTestFailed)
# Keys that say nothing of how fast a service is, or that follow from its image.
_NOT_OF_SPEED = ("contract", "gates.", "health.", "image", "keep", "kv_parallel_size", "update.")


async def save(rollout: Rollout, name: str) -> Report:
    """Write a generation's release and plan on a host, before anything of it is made."""
    session, host = rollout.locked, rollout.session.host(name)
    await session.may_change(host)
    written = await host_records.write_release(host, session.root, rollout.release, rollout.saved)
    detail = f"wrote {len(written)} files" if written else "known"
    return Report("save", name, name, bool(written), detail)


async def note_hosts(rollout: Rollout) -> None:
    """Record on which hosts something of the deployment will be, so that none is forgotten."""
    await write(rollout, rollout.history.record.on(rollout.release.hosts.values()))


async def note_closing(rollout: Rollout) -> None:
    """Record since when clients are cut off, which may be before now, so that whoever brings the
    service back, in this run or a later one, knows for how long it was down."""
    downtime, lost = rollout.attempt.downtime, await containers.lost_since(rollout)
    rollout.attempt.was_down |= lost is not None
    downtime.begin(lost)
    assert downtime.since
    record = rollout.history.record.closing(downtime.since)
    try:
        await write(rollout, record)
    finally:
        rollout.attempt.record = record  # some hosts may have it, also when the write was cut short


async def promote(rollout: Rollout, by: str) -> Report:
    """Make the generation the one that serves.

    Its image gets a local name on every host, which keeps it from a `docker image prune`.
    """
    session, generation = rollout.session, rollout.plan.generation
    names = await all_ended(_keep_or_tell(rollout, name) for name in rollout.plan.hosts)
    unkept = ", ".join(filter(None, names))
    before = rollout.history.record
    image, when = rollout.release.chosen_image, datetime.now(UTC)
    record = before.promoted(generation, when, by, image)
    if record is before:
        record = record.restarted(rollout.attempt.started, when, by, image)
        record = await _counted(rollout, record)
    else:
        runs = await _runs(rollout, session.topology.names)
        record = record.counting(runs, rollout.attempt.starts)
    record = record.released(digest_of(rollout.plan.pinned_image)).opened()
    record = record.well() if rollout.attempt.is_mend else record.rested()
    record = record.measured(rollout.attempt.figures)
    uncopied = await write(rollout, record)
    where = session.topology.home
    changed = record is not before
    detail = "serves" if changed else "serves already"
    if uncopied:
        detail += "; the record is not on " + "; not on ".join(map(str, uncopied.values()))
    if unkept:
        detail += f"; the image could not be protected from `docker image prune` on {unkept}"
    return Report("promote", generation, where, changed, detail)


async def note_back(rollout: Rollout, by: str) -> None:
    """Record that the generation before serves again, also where the other was promoted already."""
    if rollout.history.record.serving == rollout.plan.generation:
        await write(rollout, await _counted(rollout, rollout.history.record.opened()))
    else:
        await promote(rollout, by)


async def note_failure(rollout: Rollout, error: BaseException, by: str) -> None:
    """Record how an attempt ended, and that the service is open if nothing was stopped yet, unless
    it was lost meanwhile by itself, as with a host that starts again."""
    result: Result = "failed" if isinstance(error, Exception) else "interrupted"
    outcome = Outcome(
        result=result,
        when=datetime.now(UTC),
        by=by,
        reason=f"{_step(error)}{headline(error)}\n{error}"
        if result == "failed"
        else "the run was cancelled",
    )
    image = rollout.release.chosen_image
    record = rollout.history.record.ended(rollout.plan.generation, outcome, image)
    if rollout.history.record.serving == rollout.plan.generation:
        # What it started was stopped again, or is left for people to look at.
        record = record.counted(rollout.attempt.starts, rollout.runs, {})
    record = record.measured(rollout.attempt.figures)
    if not rollout.attempt.stopped and not rollout.attempt.was_down:
        lost = await _lost_meanwhile(rollout)
        record = record.closing(lost) if lost else record.opened()
    await write(rollout, record)


async def _lost_meanwhile(rollout: Rollout) -> datetime | None:
    """Look since when a service that no run has touched is lost; None if it serves, or if a host
    does not say."""
    try:
        lost = await containers.lost_since(rollout, is_patient=False)
    except PdDeployError:
        return None
    return lost and min(lost, datetime.now(UTC))


async def note_run(session: LockedSession, error: PdDeployError, by: str, began: datetime) -> None:
    """Record that a run failed, unless that was recorded with its generation.

    Where nothing was recorded yet there may be containers whose record was lost: an empty one must
    not hide that. If a host does not answer nothing is written, as it may have the newest record.
    """
    if isinstance(error, LeaseLost):
        return
    outcome = Outcome(result="failed", when=datetime.now(UTC), by=by, reason=headline(error))
    try:
        async with asyncio.timeout(NOTE_S):
            reading = (host_records.read(host, session.root) for host in session.hosts.values())
            before = host_records.merged(await together(reading)).record
            record = before.failed(outcome, began)
            if before.sequence and record is not before:
                await copies.write_record(session, copies.hosts_in_order(session), record)
    except (PdDeployError, TimeoutError) as fault:
        log.warning("that the run failed could not be recorded: %s", fault)


async def quarantine(back: Rollout, failed: Rollout, error: BaseException) -> bool:
    """Put the image of a failed generation into quarantine if the fault is its own.

    Call it once the generation before serves again: then hosts and network are all right. An
    image that served before is not to blame either: then the file was changed.

    Returns:
        Whether it is in quarantine now.
    """
    history, digest = back.history, failed.release.digest
    if digest in {history.releases[name].digest for name in history.good}:
        return False
    if not is_of_the_service(error) or await host_faults.restarted(failed):
        return False
    if any(isinstance(fault, BenchmarkFailed) for fault in faults_of(error)) and not (
        _slower_by_its_image(back, failed, error)
    ):
        return False
    quarantined = Quarantined(
        image=failed.release.chosen_image,
        when=datetime.now(UTC),
        reason=headline(error),
    )
    await write(back, history.record.quarantined(digest, quarantined))
    return True


def _slower_by_its_image(back: Rollout, failed: Rollout, error: BaseException) -> bool:
    """Tell whether only an image can be why a benchmark failed: the generation before did better by
    the same load, and nothing else is different."""
    blamed = all(
        fault.of_the_generation for fault in faults_of(error) if isinstance(fault, BenchmarkFailed)
    )
    changed = differences.of_files(back.session.deployment, failed.session.deployment)
    return blamed and all(key.startswith(_NOT_OF_SPEED) for key in changed)


def is_of_the_service(error: BaseException) -> bool:
    """Tell whether only the service itself is to blame for a failure."""
    return all(isinstance(fault, _OF_THE_SERVICE) for fault in faults_of(error))


def _step(error: BaseException) -> str:
    step = getattr(error, "step", None)
    return f"{step}: " if step else ""


async def write(
    rollout: Rollout, record: Record, besides: Collection[str] = ()
) -> dict[str, PdDeployError]:
    """Write the record if it has changed, on its home first.

    Args:
        besides: addresses of hosts that get none.

    Returns:
        By host, why it has no copy.
    """
    if record is rollout.history.record:
        return {}
    session = rollout.locked
    hosts = copies.hosts_in_order(session, besides)
    uncopied = await copies.write_record(session, hosts, record)
    rollout.attempt.record = record
    return uncopied


async def _counted(rollout: Rollout, record: Record) -> Record:
    """Count what a run has started of the generation that served before, too."""
    starts = rollout.attempt.starts
    return record.counted(starts, rollout.runs, await _runs(rollout, starts))


async def _runs(rollout: Rollout, names: Iterable[str]) -> dict[str, str]:
    """Tell which run of its container each instance is; empty where its host does not say."""
    names = list(names)
    return dict(zip(names, await together(_run(rollout, name) for name in names), strict=True))


async def _run(rollout: Rollout, name: str) -> str:
    try:
        return (await containers.require(rollout, name)).run
    except PdDeployError:
        return ""


async def _keep_or_tell(rollout: Rollout, name: str) -> str:
    """Keep a host's image if that is possible; return the host's name if it is not.

    The service is proven without it, and the next run tries again.
    """
    try:
        await retried(partial(_keep_image, rollout, name))
    except LeaseLost:
        raise
    except PdDeployError as fault:
        log.warning(
            "the image is not yet protected from `docker image prune`; the next run tries again: "
            "%s",
            fault,
        )
        return name
    return ""


async def _keep_image(rollout: Rollout, name: str) -> None:
    host = rollout.session.host(name)
    tag = local_tag(rollout.session.deployment.name, rollout.plan.generation)
    image = await host.docker.image(rollout.plan.pinned_image)
    if image and tag not in image.tags:
        await rollout.locked.may_change(host)
        await host.docker.tag(rollout.plan.pinned_image, tag)
