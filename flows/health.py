"""Checking a service every minute, and restarting what has failed."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from pd_deploy.blocks.opening import open_session
from pd_deploy.errors import LeaseHeld, LeaseLost, OnHold, PdDeployError, headline
from pd_deploy.flows import deployment_file, events, outcomes, past_checks, publish, unknown
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.roll_out import roll_out
from pd_deploy.flows.run import Run, this_run
from pd_deploy.flows.session import locked
from pd_deploy.flows.survey import restore
from pd_deploy.records import mending
from pd_deploy.records.adopted import SHOWN
from pd_deploy.records.mending import Decision
from pd_deploy.records.releases import Record
from pd_deploy.steps import copies, promotion
from pd_deploy.steps.session import LockedSession, Session
from pd_deploy.steps.verify import checking
from pd_deploy.steps.verify.checking import Checked


@flow(
    name="pd-health",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="what it stopped stays stopped; the next check goes on", reports=False)
async def health(file: str, again: bool = False) -> State[None]:
    """Check that a service serves, and restart what has failed.

    Every server is asked for its health, each proxy for a completion. Servers that link to each
    other while they load start again as one set; others alone. Nothing is touched while a run works
    on the service, or while a host is away. After `health.attempts` it gives up.

    Args:
        file: the deployment file of the service.
        again: try at once, also after giving up.
    """
    run, deployment = this_run(), deployment_file.load(file)
    # A check waits for nobody: the next one comes soon.
    gates = deployment.gates.model_copy(update={"lease": 0})
    deployment = deployment.model_copy(update={"gates": gates})
    async with open_session(deployment, with_key=True) as session:
        checked = await checking.check(session, now())
        if checked.told:
            get_run_logger().warning("%s", checked.told)
        await _count_silent(session, checked, run)
        if not checked.told:
            state = await _well(session, checked, run)
        elif why := await _in_the_way(session, checked):
            state = _ended(checked, why)
        else:
            state = await _mended_if_allowed(session, checked, run, again=again)
    await past_checks.forget()
    return state


async def _well(session: Session, checked: Checked, run: Run) -> State[None]:
    """End a check that found nothing wrong; let health try again if it had given up."""
    look = checked.look
    message = (
        f"Generation {look.status.generation} serves: {len(look.instances)} instances are "
        f"healthy, and a completion took {checked.answered or 0:.2f} s"
    )
    if await past_checks.was_told():
        events.recovered(session.deployment, checked, message)
    if look.history.record.well() is not look.history.record:
        try:
            await _note(session, run, Record.well)
        except PdDeployError as error:
            get_run_logger().warning("the next check notes that all is well again: %s", error)
    return Completed(message=message)


async def _count_silent(session: Session, checked: Checked, run: Run) -> None:
    """Record what gave no answer, for the next check to count; nothing while somebody works."""
    record = checked.look.history.record
    is_known = not (checked.working or checked.away)
    if not checked.told or not is_known or record.heard(checked.silent) is record:
        return
    try:
        await _note(session, run, lambda record: record.heard(checked.silent))
    except PdDeployError as error:
        get_run_logger().warning("that it gave no answer could not be recorded: %s", error)


async def _in_the_way(session: Session, checked: Checked) -> str:
    """Tell of trouble, once; say why it is not health's to mend, empty if it is."""
    look = checked.look
    is_adopted = bool(look.history.record.adopted_serving)
    if look.release is None and not is_adopted and not checked.away:
        return "nothing was ever promoted"
    if checked.working:
        return f"{checked.working}; nothing was touched"
    if not await past_checks.was_told():
        events.degraded(look.session.deployment, checked)
    if checked.away:
        return f"nothing is restarted before {', '.join(checked.away)} is back"
    if is_adopted:
        return f"health restarts nothing of generation {SHOWN}: `pd-deploy recover FILE` does"
    if look.others:
        return (
            f"{', '.join(look.others)} of another generation runs, so this is left to "
            "`pd-deploy recover FILE` or `deploy`"
        )
    return "" if checked.failed else _too_little(session, checked)


def _too_little(session: Session, checked: Checked) -> str:
    """Say that nothing is restarted for what was found, and what may come to be."""
    told = mending.told_of_silence(checked.silent, session.deployment.health)
    return "; ".join(filter(None, ("nothing is restarted for that", told)))


async def _mended_if_allowed(
    session: Session, checked: Checked, run: Run, *, again: bool
) -> State[None]:
    """Restart what has failed, unless too much was tried already."""
    before, options = checked.look.history.record.mending, session.deployment.health
    decision = Decision() if again else mending.decide(before, options, now())
    try:
        if decision.gives_up:
            await _note(session, run, lambda record: record.gave_up(now()))
            events.gave_up(session.deployment, checked, decision.why)
        if decision.why:
            return _ended(checked, decision.why)
        return await _mended(session, checked, run)
    except (LeaseHeld, OnHold) as error:
        return _ended(checked, f"{error.message}; nothing was touched")
    except LeaseLost:
        raise
    except PdDeployError as error:
        get_run_logger().error("%s", error)
        name = outcomes.NOTHING_SERVES if error.nothing_serves else checked.word.title()
        return Failed(name=name, message=f"{checked.told}; {error}", data=error)


async def _mended(unlocked: Session, checked: Checked, run: Run) -> State[None]:
    """Bring the serving generation back by the steps and gates of a deployment.

    Raises:
        PdDeployError: why it does not serve; that it was tried is recorded.
    """
    assert checked.look.release
    async with locked(unlocked, str(run)) as session:
        began = now()
        try:
            rollout = await restore(session, checked.look.release.generation)
            tried = mending.lately(rollout.history.record.mending, session.deployment.health, began)
            rollout = replace(rollout, failed=checking.to_restart(rollout, checked, bool(tried)))
            if not rollout.changes:
                return Completed(message=f"{checked.told}: by now all runs, nothing was touched")
            rollout.attempt.is_mend = True
            await promotion.write(rollout, rollout.history.record.mended(began))
            publish.announce(rollout)
            state = await roll_out(rollout, run)
        except LeaseLost:
            raise
        except PdDeployError as error:
            await _note_failure(session, checked, began, error)
            raise
    if not state.is_completed():
        return state
    message = f"{checked.told}. Mended: {state.message}"
    events.recovered(session.deployment, checked, message)
    return Completed(name=past_checks.MENDED, message=message)


async def _note_failure(
    session: LockedSession, checked: Checked, began: datetime, error: PdDeployError
) -> None:
    """Record that an attempt failed, and give up if it was the last one."""
    try:
        record = await copies.change_record(session, lambda record: record.not_mended(began, now()))
        decision = mending.decide(record.mending, session.deployment.health, now())
        if decision.gives_up:
            await copies.change_record(session, lambda record: record.gave_up(now()))
            why = f"{decision.why}; the last attempt failed because {headline(error)}"
            events.gave_up(session.deployment, checked, why)
    except PdDeployError as fault:
        get_run_logger().warning("that it failed could not be recorded: %s", fault)


async def _note(session: Session, run: Run, change: Callable[[Record], Record]) -> None:
    """Change the deployment's record, holding its leases for that.

    Raises:
        LeaseHeld, OnHold: it is not ours to change.
    """
    async with locked(session, str(run)) as with_lease:
        await copies.change_record(with_lease, change)


def _ended(checked: Checked, why: str) -> State[None]:
    """End a check that restarts nothing, named after its verdict."""
    return Completed(name=checked.word.title(), message=f"{checked.told}; {why}")


def now() -> datetime:
    """Return the time by the controller's clock."""
    return datetime.now(UTC)
