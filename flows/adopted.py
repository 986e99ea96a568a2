"""Bringing back a service that was started by other means, and that the deployment took over."""

from datetime import UTC, datetime
from functools import partial

from prefect import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from pd_deploy.errors import PdDeployError, RollbackFailed, RolledBack, headline
from pd_deploy.flows import events, publish
from pd_deploy.flows.away import with_all_hosts
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.overtaken import leave
from pd_deploy.flows.run import Run, page
from pd_deploy.records.adopted import SHOWN, AdoptedContainer, AdoptedService
from pd_deploy.steps import adopting, copies, timeline, waiting_room
from pd_deploy.steps.attempt import Downtime
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import LockedSession
from pd_deploy.tasks import (
    prove_adopted,
    ready_again,
    start_again,
    stop,
    stop_adopted,
)


async def serve_again(session: LockedSession, service: AdoptedService) -> Report:
    """Bring the adopted service back, and prove it; do nothing but that where all of it runs.

    Its containers are started, and in them what was started there, with its arguments, environment
    and directory: decode, prefill, and when all of them answer, the proxies.
    """
    session = session.for_deployment(session.deployment)  # waits of what failed are none of its
    if not await adopting.is_whole(session, service):
        await stop_adopted(session, service)
        servers, proxies = service.servers, service.proxies
        for role in ("decode", "prefill"):
            await _start(session, service, [c for c in servers if c.role == role])
        await fan_out(
            session.barrier, [ready_again(session, service, c.name) for c in servers if c.api_ports]
        )
        await _start(session, service, proxies)
    return await prove_adopted(session, service)


async def _start(
    session: LockedSession, service: AdoptedService, containers: list[AdoptedContainer]
) -> None:
    await fan_out(session.barrier, [start_again(session, service, c.name) for c in containers])


async def take_back(
    failed: Rollout, service: AdoptedService, error: BaseException, why: str, run: Run
) -> None:
    """Bring the adopted service back after a generation failed; raise in any case, as the run has
    still failed."""
    session = failed.locked
    session.timeline.enter(timeline.WAY_BACK)
    await waiting_room.dismiss(failed)  # the old proxies need their ports
    reason = f"new generation {failed.plan.generation} {why}"
    get_run_logger().error("%s; going back to generation %s", reason, SHOWN)
    try:
        proof = await with_all_hosts(
            session.hosts, session.deployment.gates.away, partial(serve_again, session, service)
        )
    except Exception as fault:
        if lost := session.lease.lost:
            await leave(failed, lost, error)
        events.down(failed, fault)
        raise RollbackFailed(
            f"{reason}; generation {SHOWN} does not come back either, because {headline(fault)}"
            f"\nNothing serves\n{fault}",
            hint="fix the cause, and run `pd-deploy recover FILE`, or start the old service by its "
            "own means",
        ) from error
    failed.attempt.downtime.end()
    try:
        failed.attempt.record = await copies.change_record(
            session, lambda record: record.returned(datetime.now(UTC), str(run))
        )
    except PdDeployError as fault:
        get_run_logger().error("not recorded that %s serves: %s", SHOWN, fault)
    raised = RolledBack(
        f"{reason}\nThe service is back on generation {SHOWN}, {failed.attempt.downtime}; "
        f"{proof.detail}",
        hint=f"the logs of {failed.plan.generation} are kept: `pd-deploy logs FILE "
        f"{failed.plan.generation}`",
    )
    events.back_on_adopted(failed, reason)
    await publish.taken_back(failed, raised)
    raise raised from error


async def return_to(session: LockedSession, service: AdoptedService, run: Run) -> State[None]:
    """Make the adopted service serve: stop what runs of the deployment itself, then bring it back.

    Where all of it runs already it is only proven.

    Raises:
        PdDeployError: it does not come back; marked if so nothing serves.
    """
    if of_run := page.get(None):
        of_run.acts = True
    downtime = Downtime()
    try:
        said = await _returned(session, service, run, downtime)
    except PdDeployError as fault:
        if session.lease.lost:
            raise session.lease.lost from fault
        if downtime.since:
            fault.nothing_serves = True
        raise
    said += [str(downtime)] if downtime.since else ["nothing changed"]
    return Completed(message="; ".join(filter(None, said)))


async def _returned(
    session: LockedSession, service: AdoptedService, run: Run, downtime: Downtime
) -> list[str]:
    """Bring the adopted service back; return what is to be said of it."""
    stopped = ""
    if not await adopting.is_whole(session, service):
        record = await copies.change_record(session, lambda r: r.closing(datetime.now(UTC)))
        downtime.since = record.closed
        reports = []
        for hosts in session.proxies_first:
            reports += await fan_out(session.barrier, [stop(session, name) for name in hosts])
        stopped = ", ".join(report.detail for report in reports if report.changed)
    proof = await with_all_hosts(
        session.hosts, session.deployment.gates.away, partial(serve_again, session, service)
    )
    downtime.end()
    await copies.change_record(session, lambda r: r.returned(datetime.now(UTC), str(run)))
    return [f"Generation {SHOWN}: {proof.detail}", stopped]
