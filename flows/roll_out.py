"""Carrying a rollout out: to the end, or back to the generation that served before."""

import asyncio
from collections.abc import Sequence
from typing import Literal

from prefect import State
from prefect.logging import get_run_logger

from pd_deploy.errors import RollbackFailed, RolledBack
from pd_deploy.flows import publish
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.run import Run
from pd_deploy.flows.stages import prove_and_open, run_stages
from pd_deploy.planning.plans import STAGES, Stage
from pd_deploy.steps import containers, promotion, surveying
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session
from pd_deploy.tasks.promote import promote
from pd_deploy.tasks.survey import survey
from pd_deploy.tasks.tidy import clear, prune

OnFailure = Literal["rollback", "keep"]


async def roll_out(
    rollout: Rollout, run: Run, stages: Sequence[Stage] = STAGES, on_failure: OnFailure = "rollback"
) -> State[None]:
    """Makes a generation serve, or puts back what served before.

    Raises:
        RolledBack: it failed, and the generation before serves again.
        RollbackFailed: it failed, and so did the way back.
        PdDeployError: it failed before anything that served was stopped.
    """
    try:
        reports = await run_stages(rollout, list(stages))
        completion = None
        if "server" in stages:
            completion, opened = await prove_and_open(rollout, reports)
            reports += [*opened, await promote(rollout, str(run), wait_for=opened)]
    except BaseException as error:
        await abort(rollout, error, run, stages, on_failure)
        raise
    if completion:
        reports += await tidy_up(rollout, reports)
    return await publish.success(rollout, reports, completion)


async def abort(
    rollout: Rollout,
    error: BaseException,
    run: Run,
    stages: Sequence[Stage],
    on_failure: OnFailure,
) -> None:
    """Stops what the run has started, records why, and goes back where there is a way back."""
    if on_failure == "keep" and isinstance(error, Exception):
        get_run_logger().warning("on_failure=keep: what was started is left as it is")
        await promotion.note_failure(rollout, error, str(run))
        await publish.failure(rollout, error, {})
        return
    stopped = await containers.stop_started(rollout)
    before = rollout.history.serving
    try:
        await promotion.note_failure(rollout, error, str(run))
    except Exception as fault:
        get_run_logger().warning("why it failed could not be recorded: %s", fault)
    to_undo = (
        isinstance(error, Exception) and rollout.attempt.stopped and set(stages) == set(STAGES)
    )
    if to_undo and before and before.generation != rollout.plan.generation:
        await roll_back(rollout, error, before.generation)
    else:
        await publish.failure(rollout, error, stopped)


async def roll_back(failed: Rollout, error: BaseException, generation: str) -> None:
    """Brings the generation before back; always raises, as the run has failed all the same."""
    what = f"new generation {failed.plan.generation} failed {_at(error)}because {_why(error)}"
    get_run_logger().error("%s; going back to %s", what, generation)
    try:
        back = await restore(failed.session, generation)
        reports = await run_stages(back, list(STAGES))
        completion, opened = await prove_and_open(back, reports)
        await promotion.note_opened(back)
    except Exception as fault:
        states = await surveying.states(failed.session)
        raise RollbackFailed(
            f"{what}; generation {generation} does not come back either, because {_why(fault)}\n"
            f"Nothing serves. {states}",
            hint="look at these logs, mend the cause, and run `pd-deploy recover FILE`",
        ) from error
    image = ""
    if await promotion.quarantine(back, failed, error):
        image = f"; its image {failed.release.chosen_image} is in quarantine"
    reports += [*opened, *await tidy_up(back, reports)]
    raised = RolledBack(
        f"{what}\nThe service is back on generation {generation}, {back.attempt.downtime}{image}",
        hint=f"the logs of {failed.plan.generation} are kept: `pd-deploy logs FILE "
        f"{failed.plan.generation}`",
    )
    await publish.rolled_back(back, raised, reports, completion)
    raise raised from error


async def restore(session: Session, generation: str) -> Rollout:
    """The rollout that brings a kept generation back, as the hosts are now."""
    there, saved = await surveying.saved(session, generation)
    return surveying.restored(there, saved, await survey_hosts(there))


async def survey_hosts(session: Session) -> list[HostState]:
    """What all hosts say now."""
    return await fan_out(session.barrier, [survey(session, name) for name in session.hosts])


async def tidy_up(rollout: Rollout, after: Sequence[Report]) -> list[Report]:
    """Removes old generations, and everything from hosts that the deployment has left.

    What can't be removed is told and tried again by the next run: the service is up.
    """
    session, past = rollout.locked, rollout.history
    serves = past.record.serving == rollout.plan.generation
    steps = [prune(session, name, past, wait_for=after) for name in rollout.plan.hosts]
    steps += [clear(session, name, past, wait_for=after) for name in session.former if serves]
    results = await asyncio.gather(*steps, return_exceptions=True)
    for fault in (one for one in results if isinstance(one, Exception)):
        get_run_logger().warning("left for the next run: %s", fault)
    done = [one for one in results if isinstance(one, Report)]
    cleared = {session.hosts[one.host].address for one in done if one.step == "clear"}
    cleared |= session.forgotten
    if all(isinstance(one, Report) for one in results):
        record = past.record.left(cleared).without(past.found - past.kept(session.deployment.keep))
        await promotion.write(rollout, record, besides=cleared)
    return done


def _at(error: BaseException) -> str:
    step = getattr(error, "step", None)
    return f"at `{step}` " if step else ""


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
