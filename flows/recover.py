"""Repairing what an interrupted run left behind."""

from collections.abc import Iterable
from functools import partial

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.states import Completed

from pd_deploy.blocks.opening import open_session
from pd_deploy.errors import HostAway, NothingServes, PdDeployError
from pd_deploy.flows import deployment_file, events, publish, unknown
from pd_deploy.flows.adopted import return_to
from pd_deploy.flows.away import with_all_hosts
from pd_deploy.flows.dead import untouched
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.roll_out import roll_out
from pd_deploy.flows.run import Run, this_run
from pd_deploy.flows.session import locked, patient
from pd_deploy.flows.survey import plan, restore, survey_hosts
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.records import generations
from pd_deploy.steps import surveying
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import LockedSession, Session
from pd_deploy.tasks import stop

PATIENCE_S = 24 * 3600  # nobody watches an automation, and no run lasts a day


@flow(
    name="pd-recover",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="what it stopped stays stopped; run it again")
async def recover(file: str, after: str | None = None, message: str | None = None) -> State[None]:
    """Repair what an interrupted run left behind, so that the promoted generation serves.

    A generation that was promoted is completed; one that was not is stopped, and the previous one
    serves again, also where that was adopted. If all is well, nothing is touched. If nothing was
    ever promoted, what the interrupted run started is stopped. If the hosts have lost the record of
    what was deployed, a whole generation that runs is recorded again; anything else that runs is
    left alone.

    Args:
        file: the deployment file of the service to repair.
        after: the interrupted run, as `prefect.flow-run.ID`; set by an automation. Then this run
            waits up to a day for any other run that works on the deployment.
        message: why you start the run; shown where runs are listed.
    """
    run, deployment = this_run(), deployment_file.load(file)
    if after:
        if why := await untouched(after):
            return Completed(message=f"skipped, as {why}; nothing was touched")
        deployment = patient(deployment, PATIENCE_S)
    async with open_session(deployment, with_key=True) as opened:
        try:
            return await with_all_hosts(
                opened.hosts, deployment.gates.away, partial(_recovered, opened, run)
            )
        except HostAway as error:
            opened.tell_if_former(error)
            error.message += f"\n{await surveying.states(opened)}"
            raise


async def _recovered(unlocked: Session, run: Run) -> State[None]:
    """Recover from what is there; the waits of an earlier attempt have nothing to do with it."""
    fresh = Session(
        unlocked.deployment,
        unlocked.hosts,
        unlocked.registry_login,
        api_key=unlocked.api_key,
    )
    async with locked(fresh, str(run)) as session:
        states = await survey_hosts(session)
        history = surveying.history_of(states)
        if running := surveying.unrecorded(states):
            return await roll_out(await written_down(session, running, str(run)), run)
        if service := history.record.adopted_serving:
            try:
                return await return_to(session, service, run)
            except PdDeployError as error:
                if error.nothing_serves:
                    error.message += (
                        "\nNothing serves: run this again once the cause is fixed, or "
                        "`pd-deploy deploy FILE`, or start the old service by its own means"
                    )
                    events.adopted_down(session.deployment, service, error)
                raise
        if history.serving is None:
            return await stop_all(session, states)
        rollout = await restore(session, history.serving.generation)
        publish.announce(rollout)
        return await roll_out(rollout, run)


async def written_down(
    session: LockedSession, running: list[tuple[str, ContainerState]], run: str
) -> Rollout:
    """Plan to write down what runs, if it is a whole generation of the file.

    Raises:
        Unrecorded: it is not, or the file was changed since.
    """
    images = {surveying.image_of(state) for _, state in running}
    why: Exception | None = None
    try:
        rollout = await plan(session, images.pop(), run)
    except PdDeployError as error:
        why = error
    else:
        if not images and rollout.all_run:
            get_run_logger().warning(
                "no host knows what was deployed, but all of generation %s runs; recording that "
                "it serves",
                rollout.plan.generation,
            )
            return rollout
    raise surveying.lost(session, running) from why


async def stop_all(session: LockedSession, states: Iterable[HostState]) -> State[None]:
    """Stop what runs, as there is nothing to go back to.

    Raises:
        NothingServes: clients could reach it.
    """
    get_run_logger().info("no generation was ever promoted; stopping what runs")
    ports = {proxy.port for proxy in session.topology.proxies}
    was_open = any(
        ports & state.listening
        and any(
            c.labels.get(generations.ROLE) == "proxy" and c.status in generations.RUNNING
            for c in state.containers
        )
        for state in states
    )
    reports = await fan_out(session.barrier, [stop(session, name) for name in session.hosts])
    stopped_text = ", ".join(report.detail for report in reports if report.changed) or "nothing ran"
    if was_open:
        raise NothingServes(
            f"no generation was ever promoted, so there is none to go back to: {stopped_text}",
            hint="`pd-deploy deploy FILE` brings the service up",
        )
    return Completed(message=f"No generation to go back to: {stopped_text}")
