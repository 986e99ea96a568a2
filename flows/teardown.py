"""Removing a deployment from its hosts."""

from prefect import State, flow
from prefect.logging import get_run_logger

from pd_deploy.config.fields import shown
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.flows import deployment_file, publish, targets, unknown
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.flows.interrupts import interruptible
from pd_deploy.flows.run import this_run
from pd_deploy.flows.session import locked_session
from pd_deploy.flows.survey import survey_hosts
from pd_deploy.records.adopted import AdoptedService
from pd_deploy.steps import surveying
from pd_deploy.steps.report import Report
from pd_deploy.tasks import clear, stop


@flow(
    name="pd-teardown",
    flow_run_name=publish.run_name,
    persist_result=False,
    on_crashed=[unknown.tell],
)
@interruptible(left="what it removed is gone; run it again")
async def teardown(file: str, name: str) -> State[None]:
    """Remove a deployment from its hosts: containers, files, logs and images, and nothing else.

    Args:
        file: the deployment file of the service.
        name: the name of the deployment, as the file has it: to confirm that this one goes.
    """
    deployment = deployment_file.load(file)
    if name != deployment.name:
        expected = (
            f"expected {deployment.name}, the name of the deployment to remove, found {shown(name)}"
        )
        raise InvalidInput([Problem("name", expected)])
    async with locked_session(deployment, str(this_run()), with_key=False) as session:
        history = surveying.history_of(await survey_hosts(session))
        proxies, others = session.proxies_first
        stopped = await fan_out(session.barrier, [stop(session, name) for name in proxies])
        cleared = await fan_out(
            session.barrier, [clear(session, name, history) for name in (*proxies, *others)]
        )
    if unwritten := targets.remove(deployment.name):
        get_run_logger().warning("%s", unwritten)
    left = _left(history.record.adopted)
    return await publish.removed(deployment.name, [*stopped, *cleared, *left])


def _left(service: AdoptedService | None) -> list[Report]:
    """Tell of an adopted service's containers, which are not the deployment's to remove."""
    if service is None:
        return []
    names = ", ".join(container.name for container in service.containers)
    return [Report("leave", "adopted", "adopted", False, f"{names} are left as they are")]
