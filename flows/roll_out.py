"""Carrying out a rollout: to its end, or back to the generation that served before."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Literal

from prefect import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from pd_deploy.errors import PdDeployError, RollbackFailed, RolledBack, faults_of, headline
from pd_deploy.flows import events, publish, targets
from pd_deploy.flows.adopted import take_back
from pd_deploy.flows.away import hosts_away, with_all_hosts
from pd_deploy.flows.interrupts import goes_on
from pd_deploy.flows.line import Line
from pd_deploy.flows.overtaken import leave
from pd_deploy.flows.run import Run, page, remedy
from pd_deploy.flows.stages import prove_and_open, run_stages
from pd_deploy.flows.survey import restore
from pd_deploy.planning.plans import STAGES, Stage
from pd_deploy.steps import (
    containers,
    promotion,
    stopping,
    surveying,
    timeline,
    waiting_room,
)
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.verify.smoke import Completion
from pd_deploy.tasks import clear, promote, prune

OnFailure = Literal["rollback", "keep"]


async def roll_out(
    rollout: Rollout, run: Run, stages: Sequence[Stage] = STAGES, on_failure: OnFailure = "rollback"
) -> State[None]:
    """Make a generation serve, or bring back what served before.

    Returns:
        The run's last state: Completed, or Cancelled if it was interrupted, with what became of the
        service.

    Raises:
        RolledBack: it failed, and the generation before serves again.
        RollbackFailed: it failed, and so did the way back.
        PdDeployError: it failed before anything that served was stopped.
    """
    session = rollout.session
    line, completion = Line(session.barrier, session.timeline, rollout), None
    if of_run := page.get(None):
        of_run.acts = True
    rollout.attempt.connects = {name: host.connects for name, host in rollout.session.hosts.items()}
    try:
        if rollout.changes or set(stages) != set(STAGES):
            await run_stages(line, rollout, list(stages))
        if "server" in stages:
            completion = await prove_and_open(line, rollout)
            before = rollout.history.record.serving
            await line.together([promote.after(*line.ends)(rollout, str(run))])
            if before != rollout.plan.generation:
                events.promoted(rollout)
            if unwritten := targets.refresh(rollout):
                get_run_logger().warning("%s", unwritten)
    except Exception as error:
        if interrupted := await undo(rollout, error, run, stages, on_failure):
            return interrupted
        raise
    except asyncio.CancelledError as error:
        return await undo_interrupted(rollout, error, run, stages)
    try:
        if completion:
            await tidy_up(line, rollout)
        return await publish.success(rollout, line.reports, completion)
    except asyncio.CancelledError:
        return publish.interrupted_late(rollout)


async def undo_interrupted(
    rollout: Rollout, error: asyncio.CancelledError, run: Run, stages: Sequence[Stage]
) -> State[None]:
    """Undo an attempt that was cancelled; return the run's last state."""
    if not _goes_on(rollout):
        return publish.ended_at_once(rollout.history.record)
    get_run_logger().warning(
        "interrupted; stopping what generation %s started", rollout.plan.generation
    )
    try:
        if ended := await undo(rollout, error, run, stages, "rollback"):
            return ended
    except (RolledBack, RollbackFailed) as outcome:
        get_run_logger().warning("%s", outcome)
        return Cancelled(message=str(outcome))
    return publish.interrupted(rollout, stages)


async def undo(
    rollout: Rollout,
    error: BaseException,
    run: Run,
    stages: Sequence[Stage],
    on_failure: OnFailure,
) -> State[None] | None:
    """Do what follows a failed or cancelled attempt, as `abort`.

    When it is cancelled for the first time, it goes on from its beginning: all that it does looks
    first. The second time, everything ends.

    Returns:
        The run's last state if it was interrupted and did not end as it should, else None.
    """
    while True:
        try:
            await abort(rollout, error, run, stages, on_failure)
            return None
        except asyncio.CancelledError:
            if not _goes_on(rollout):
                return publish.ended_at_once(rollout.history.record)


def _goes_on(rollout: Rollout) -> bool:
    """Tell whether an attempt that was cancelled may still be undone; see `goes_on`."""
    attempt = rollout.attempt
    goes = goes_on(rollout.locked.lease, interrupted=attempt.interrupted)
    attempt.interrupted = True
    return goes


async def abort(
    rollout: Rollout,
    error: BaseException,
    run: Run,
    stages: Sequence[Stage],
    on_failure: OnFailure,
) -> None:
    """Stop what the run has started, record why, and go back if that is possible."""
    if lost := rollout.locked.lease.lost:
        await leave(rollout, lost, error)
    if on_failure == "keep":
        get_run_logger().warning("on_failure=keep: what was started is left as it is")
        await waiting_room.dismiss(rollout)
        await promotion.note_failure(rollout, error, str(run))
        _tell_if_down(rollout, error)
        await publish.failure(rollout, error, {})
        return
    stopped = await containers.stop_started(rollout)
    before = rollout.way_back
    try:
        await promotion.note_failure(rollout, error, str(run))
    except Exception as fault:
        get_run_logger().warning("why it failed could not be recorded: %s", fault)
    to_undo = rollout.attempt.stopped and set(stages) == set(STAGES)
    if to_undo and before and before.generation != rollout.plan.generation:
        await roll_back(rollout, error, before.generation, run)
    elif to_undo and (service := rollout.history.record.adopted_serving):
        await take_back(rollout, service, error, _end(error), run)
    else:
        await waiting_room.dismiss(rollout)
        down = f"\nNothing serves: {remedy('FILE')} once the cause is fixed"
        if rollout.history.record.closed and isinstance(error, PdDeployError):
            error.message = error.message.removesuffix(down) + down
        _tell_if_down(rollout, error)
        await publish.failure(rollout, error, stopped)


def _tell_if_down(rollout: Rollout, error: BaseException) -> None:
    """Emit an event, and mark the error, if a failed attempt leaves nothing that serves; where
    health found that, it has told already."""
    record, attempt = rollout.history.record, rollout.attempt
    if record.closed or not record.serving_name:
        if isinstance(error, PdDeployError):
            error.nothing_serves = True
        if not (attempt.is_mend and attempt.was_down):
            events.down(rollout, error)


async def roll_back(failed: Rollout, error: BaseException, generation: str, run: Run) -> None:
    """Bring the previous generation back; raise in any case, as the run has still failed."""
    session = failed.session
    hosts, seconds = session.hosts, session.deployment.gates.away
    away = await hosts_away(hosts)
    # Servers may have ended because those of a host that was away for a moment were gone.
    lost = any(host.connects > failed.attempt.connects[name] for name, host in hosts.items())
    reason = f"new generation {failed.plan.generation} {_end(error)}"
    reason = "; ".join([reason, *(f"meanwhile {fault}" for fault in away.values())])
    session.timeline.enter(timeline.WAY_BACK)
    get_run_logger().error("%s; going back to %s", reason, generation)
    attempts: list[Rollout] = []
    try:
        back, line, completion = await with_all_hosts(
            hosts, seconds, partial(_serve_again, failed, generation, attempts)
        )
    except Exception as fault:
        if lease_lost := failed.locked.lease.lost:
            await leave(failed, lease_lost, error)
        if attempts:
            await containers.stop_started(attempts[-1])
        await waiting_room.dismiss(failed)
        states = await surveying.states(
            session, {generation, failed.plan.generation, failed.plan.servers}
        )
        same = headline(fault) == headline(error)
        because = "for the same reason" if same else f"because {headline(fault)}"
        events.down(failed, fault)
        both = RollbackFailed(
            f"{reason}; generation {generation} does not come back either, {because}"
            f"\nNothing serves. {states}"
            f"{_below(error, failed.plan.generation)}{_below(fault, generation)}",
            hint=f"read these logs, fix the cause, and run {remedy('FILE')}",
        )
        await publish.failure(failed, both, {})
        raise both from error
    image = ""
    try:
        note = partial(_note_way_back, back, failed, None if away or lost else error, str(run))
        if await with_all_hosts(hosts, seconds, note):
            image = f"; its image {failed.release.chosen_image} is in quarantine"
            events.quarantined(failed, error)
    except PdDeployError as fault:
        get_run_logger().error("not recorded that %s serves: %s", generation, fault)
    await tidy_up(line, back)
    cut = stopping.told_of(failed.attempt.cut + back.attempt.cut, failed.locked)
    cut = "; ".join(filter(None, (back.attempt.said_of_held, cut)))
    raised = RolledBack(
        f"{reason}\nThe service is back on generation {generation}, {back.attempt.downtime}{image}"
        f"{cut and f'; {cut}'}"
        f"{_below(error, failed.plan.generation)}",
        hint=f"the logs of {failed.plan.generation} are kept: `pd-deploy logs FILE "
        f"{failed.plan.generation}`",
    )
    events.rolled_back(failed, back, reason)
    await publish.rolled_back(back, failed, raised, completion)
    raise raised from error


async def _serve_again(
    failed: Rollout, generation: str, attempts: list[Rollout]
) -> tuple[Rollout, Line, Completion]:
    """Bring a generation back from what is there; add the attempt to those made so far."""
    back = await restore(failed.session, generation)
    if attempts:
        # What an earlier attempt has opened was closed by this run all the same.
        back.attempt.stopped = True
    attempts.append(back)
    back.attempt.downtime.drain = failed.attempt.downtime.drain
    back.attempt.downtime.benchmark = failed.attempt.downtime.benchmark
    line = Line(back.session.barrier, back.session.timeline, back)
    await run_stages(line, back, list(STAGES))
    return back, line, await prove_and_open(line, back)


async def _note_way_back(
    back: Rollout, failed: Rollout, error: BaseException | None, by: str
) -> bool:
    """Record that clients are served again; tell whether the failed image is in quarantine."""
    await promotion.note_back(back, by)
    return error is not None and await promotion.quarantine(back, failed, error)


async def tidy_up(line: Line, rollout: Rollout) -> None:
    """Remove old generations, and everything on hosts that the deployment no longer uses.

    What can't be removed is logged and left for the next run, because the service is up.
    """
    session, history = rollout.locked, rollout.history
    session.timeline.enter(timeline.TIDY)
    serves = history.record.serving == rollout.plan.generation
    outdated = history.generations - history.kept(session.deployment.keep)
    steps = [
        prune.after(*line.ends)(session, name, history)
        for name in rollout.plan.hosts
        if outdated or rollout.changes or rollout.states[name].has_leftovers
    ]
    steps += [clear.after(*line.ends)(session, name, history) for name in session.former if serves]
    results = await asyncio.gather(*steps, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            get_run_logger().warning("left for the next run: %s", result)
    reports = [result for result in results if isinstance(result, Report)]
    cleared = {session.hosts[r.host].address for r in reports if r.step == "clear"}
    cleared |= session.forgotten
    if len(reports) == len(results):
        record = history.record.left(cleared).without(outdated)
        await promotion.write(rollout, record, besides=cleared)
    line.reports += reports


def _end(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "was stopped, as the run was interrupted"
    steps = [getattr(fault, "step", None) for fault in faults_of(error)]
    at = ", ".join(f"`{step}`" for step in dict.fromkeys(filter(None, steps)))
    at = f"at {at} " if at else ""
    return f"failed {at}because {headline(error)}"


def _below(error: BaseException, generation: str) -> str:
    """Return what the faults of a generation say besides their headlines, such as logs, each once,
    with where it was."""
    details = {}
    for fault in faults_of(error):
        if rest := str(fault).partition("\n")[2]:
            where = fault.instance or fault.host if isinstance(fault, PdDeployError) else None
            details[rest] = where or type(fault).__name__
    return "".join(f"\n{where} of {generation}: {rest}" for rest, where in details.items())
