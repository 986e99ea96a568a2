"""After a run that ended in the middle: back to a coherent generation."""

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

PATIENCE_S = 24 * 3600


@flow(name="pd-recover", flow_run_name=publish.run_name, persist_result=False)
async def recover(file: str, after: str | None = None) -> State[None]:
    """Finds out from the hosts what serves or is to, and makes it so.

    A generation that was promoted is completed; one that was not is stopped, and the one before
    serves again. Where all is well, nothing is touched. Where nothing was ever promoted, whatever
    an interrupted run left is stopped.

    Args:
        file: the deployment file; says which deployment, and how its hosts are reached.
        after: the run that was interrupted, as `prefect.flow-run.ID`; an automation gives it. Then
            another run that works on the deployment is waited for as long as it takes.
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
