"""Repairing what an interrupted run left behind."""

from pathlib import Path

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.states import Completed

from pd_deploy.config.load import load_deployment
from pd_deploy.flows import publish
from pd_deploy.flows.dead import untouched
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.roll_out import roll_out
from pd_deploy.flows.run import this_run
from pd_deploy.flows.session import locked_session, patient
from pd_deploy.flows.survey import restore, survey_hosts
from pd_deploy.steps import surveying
from pd_deploy.tasks import stop

PATIENCE_S = 24 * 3600  # nobody watches an automation, and no run lasts a day


@flow(name="pd-recover", flow_run_name=publish.run_name, persist_result=False)
async def recover(file: str, after: str | None = None) -> State[None]:
    """Repair what an interrupted run left behind, so that the promoted generation serves.

    A generation that was promoted is completed; one that was not is stopped, and the previous one
    serves again. If all is well, nothing is touched. If nothing was ever promoted, what the
    interrupted run started is stopped.

    Args:
        file: the deployment file of the service to repair.
        after: the interrupted run, as `prefect.flow-run.ID`; set by an automation. Then this run
            waits up to a day for any other run that works on the deployment.
    """
    run, given = this_run(), load_deployment(Path(file))
    if after:
        if why := await untouched(after):
            return Completed(message=f"skipped, as {why}; nothing was touched")
        given = patient(given, PATIENCE_S)
    async with locked_session(given, str(run)) as session:
        past = surveying.past_of(await survey_hosts(session))
        if past.serving is None:
            get_run_logger().info("no generation was ever promoted; stopping what runs")
            stopped = await fan_out(
                session.barrier, [stop(session, name) for name in session.hosts]
            )
            what = ", ".join(one.detail for one in stopped if one.changed) or "nothing ran"
            return Completed(message=f"No generation to go back to: {what}")
        rollout = await restore(session, past.serving.generation)
        publish.found(rollout)
        return await roll_out(rollout, run)
