"""Bringing back a generation that served before."""

import asyncio
from collections.abc import Iterable
from typing import NoReturn

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from pd_deploy.errors import (
    LeaseLost,
    NoSuchGeneration,
    PdDeployError,
    RollbackFailed,
    RolledBack,
    headline,
)
from pd_deploy.flows import deployment_file, events, publish, unknown
from pd_deploy.flows.adopted import return_to
from pd_deploy.flows.away import with_all_hosts
from pd_deploy.flows.interrupts import GOES_BACK, goes_on, interruptible
from pd_deploy.flows.roll_out import roll_out
from pd_deploy.flows.run import Run, this_run
from pd_deploy.flows.session import locked_session
from pd_deploy.flows.survey import restore, survey_hosts
from pd_deploy.records.adopted import GENERATION as ADOPTED
from pd_deploy.records.adopted import SHOWN, AdoptedService
from pd_deploy.records.releases import History, HostAccess, Release
from pd_deploy.steps import surveying
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import LockedSession
from pd_deploy.tasks import stop_adopted


@flow(
    name="pd-rollback",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="nothing that serves was touched", first=GOES_BACK)
async def rollback(
    file: str, generation: str | None = None, message: str | None = None
) -> State[None]:
    """Bring back a generation that served before, with its own image, scripts and ranktables.

    It has to pass the same checks as a new one. If it fails, what serves now is started again.

    Args:
        file: the deployment file of the service.
        generation: one that `pd-deploy releases` lists, 0 for what was adopted; by default, the
            previous good one.
        message: why you start the run; shown where runs are listed.
    """
    run, deployment = this_run(), deployment_file.load(file)
    async with locked_session(
        deployment, str(run), lambda history: _hosts_of(history, generation)
    ) as session:
        history = surveying.history_of(await survey_hosts(session))
        if service := adopted_target(history, generation):
            return await _to_adopted(session, service, history, run)
        release = target(history, generation)
        rollout = await restore(session, release.generation)
        publish.announce(rollout)
        return await roll_out(rollout, run)


def target(history: History, generation: str | None) -> Release:
    """Choose the release to go back to.

    Raises:
        NoSuchGeneration: it is not kept, or there is no good one before.
    """
    name = generation or history.before()
    if release := history.releases.get(name or ""):
        return release
    kept = ", ".join(sorted(history.releases)) or "none"
    raise NoSuchGeneration(
        f"expected {name or 'a good generation before the one that serves'} among the kept "
        f"generations, found {kept}",
        hint="`pd-deploy releases FILE` says what became of each",
    )


def adopted_target(history: History, generation: str | None) -> AdoptedService | None:
    """Return the adopted service, if it is to go back to: it is named, or no other one is good."""
    named = generation == ADOPTED or (generation is None and history.before() is None)
    return history.record.adopted if named else None


def _hosts_of(history: History, generation: str | None) -> Iterable[HostAccess]:
    """List the hosts of the release to go back to; those of an adopted service are the file's."""
    if adopted_target(history, generation):
        return ()
    return target(history, generation).hosts.values()


async def _to_adopted(
    session: LockedSession, service: AdoptedService, history: History, run: Run
) -> State[None]:
    """Bring the adopted service back; if that fails, or is cancelled for the first time, what
    serves now is started again.

    Raises:
        RolledBack: it failed, and what served serves again.
        RollbackFailed: it failed, and so did the way back.
    """
    try:
        return await return_to(session, service, run)
    except LeaseLost:
        raise
    except (Exception, asyncio.CancelledError) as fault:
        if history.serving is None:
            raise
        error, generation = fault, history.serving.generation
    was_cancelled = interrupted = isinstance(error, asyncio.CancelledError)
    goes = not interrupted or goes_on(session.lease, interrupted=False)
    while goes:
        try:
            await _instead(session, service, generation, error, run, interrupted=interrupted)
        except asyncio.CancelledError:
            goes = goes_on(session.lease, interrupted=interrupted)
            interrupted = True
        except (RolledBack, RollbackFailed) as outcome:
            if not was_cancelled:
                raise
            return Cancelled(message=str(outcome))
    return publish.ended_at_once(history.record)


async def _instead(
    session: LockedSession,
    service: AdoptedService,
    generation: str,
    error: BaseException,
    run: Run,
    *,
    interrupted: bool,
) -> NoReturn:
    """Make a generation serve again in place of the adopted service; raise in any case, as the run
    has still failed.

    Args:
        error: why the adopted service does not serve.
        interrupted: whether the run was cancelled before, so that it ends at once the next time.
    """

    async def serve() -> Rollout:
        await stop_adopted(session.for_deployment(session.deployment), service)
        back = await restore(session, generation)
        back.attempt.interrupted = interrupted
        if (await roll_out(back, run)).is_cancelled():
            raise asyncio.CancelledError
        return back

    why = f"does not come back: {error}"
    if isinstance(error, asyncio.CancelledError):
        why = "was stopped, as the run was interrupted"
    reason = f"generation {SHOWN} {why}"
    get_run_logger().error("%s; going back to %s", reason, generation)
    try:
        back = await with_all_hosts(session.hosts, session.deployment.gates.away, serve)
    except Exception as fault:
        if session.lease.lost:
            raise session.lease.lost from fault
        if not (isinstance(fault, PdDeployError) and fault.nothing_serves):
            events.adopted_down(session.deployment, service, fault)
        raise RollbackFailed(
            f"{reason}\nGeneration {generation} does not come back either, because "
            f"{headline(fault)}\nNothing serves\n{fault}",
            hint="fix the cause, and run `pd-deploy recover FILE`",
        ) from error
    raised = RolledBack(
        f"{reason}\nThe service is back on generation {generation}, {back.attempt.downtime}"
    )
    await publish.taken_back(back, raised)
    raise raised from error
