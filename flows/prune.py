"""Removing old generations on request."""

from prefect import State, flow
from prefect.states import Completed

from pd_deploy.errors import NoSuchGeneration, OutOfOrder
from pd_deploy.flows import deployment_file, publish, unknown
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.run import this_run
from pd_deploy.flows.session import locked_session
from pd_deploy.flows.survey import survey_hosts
from pd_deploy.records.adopted import SHOWN
from pd_deploy.records.releases import History
from pd_deploy.steps import copies, surveying
from pd_deploy.steps.session import LockedSession
from pd_deploy.tasks import prune as prune_host
from pd_deploy.tasks import prune_adopted


@flow(
    name="pd-prune", flow_run_name=publish.run_name, persist_result=False, on_crashed=[unknown.tell]
)
@interruptible(left="what it removed is gone; the next run goes on")
async def prune(file: str, adopted: bool = False) -> State[None]:
    """Remove old generations, except the one that serves, the last good ones and the latest.

    The file's `keep` says how many good ones stay. Every deployment ends with this step.

    Args:
        file: the deployment file.
        adopted: remove the adopted service instead, generation 0, once another one serves.
    """
    deployment = deployment_file.load(file)
    async with locked_session(deployment, str(this_run()), with_key=False) as session:
        history = surveying.history_of(await survey_hosts(session))
        if adopted:
            return await _prune_adopted(session, history)
        steps = [prune_host(session, name, history) for name in session.hosts]
        reports = await fan_out(session.barrier, steps)
        await publish.listing(deployment.name, history.pruned(deployment.keep))
    return Completed(message="; ".join(f"{report.host}: {report.detail}" for report in reports))


async def _prune_adopted(session: LockedSession, history: History) -> State[None]:
    """Remove the adopted service.

    Raises:
        OutOfOrder: it serves.
        NoSuchGeneration: there is none.
    """
    service = history.record.adopted
    if service is None:
        raise NoSuchGeneration("expected an adopted service, found none")
    if history.record.adopted_serving:
        raise OutOfOrder(
            f"expected another generation to serve, found generation {SHOWN}",
            hint="`pd-deploy deploy FILE` brings one up",
        )
    steps = [prune_adopted(session, service, name) for name in session.hosts]
    reports = await fan_out(session.barrier, steps)
    await copies.change_record(session, lambda record: record.adopting(None))
    return Completed(message="; ".join(f"{report.host}: {report.detail}" for report in reports))
