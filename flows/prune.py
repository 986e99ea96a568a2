"""Removing old generations on request."""

from prefect import State, flow
from prefect.states import Completed

from pd_deploy.flows import deployment_file, publish, unknown
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.run import this_run
from pd_deploy.flows.session import locked_session
from pd_deploy.flows.survey import survey_hosts
from pd_deploy.steps import surveying
from pd_deploy.tasks import prune as prune_host


@flow(
    name="pd-prune", flow_run_name=publish.run_name, persist_result=False, on_crashed=[unknown.tell]
)
@interruptible(left="what it removed is gone; the next run goes on")
async def prune(file: str) -> State[None]:
    """Remove old generations, except the one that serves, the last good ones and the latest.

    The file's `keep` says how many good ones stay. Every deployment ends with this step.

    Args:
        file: the deployment file.
    """
    deployment = deployment_file.load(file)
    async with locked_session(deployment, str(this_run())) as session:
        history = surveying.history_of(await survey_hosts(session))
        steps = [prune_host(session, name, history) for name in session.hosts]
        reports = await fan_out(session.barrier, steps)
        await publish.listing(deployment.name, history.pruned(deployment.keep))
    return Completed(message="; ".join(f"{report.host}: {report.detail}" for report in reports))
