"""Prepare the proxy, and open its port."""

from pd_deploy.steps import containers
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.verify import smoke
from pd_deploy.tasks.step import step


@step("prepare proxy {instance}")
async def prepare_proxy(rollout: Rollout, instance: str) -> Report:
    """Starts the proxy's container up to the point where it could open its port."""
    return await containers.prepare_proxy(rollout)


@step("open proxy {instance}")
async def open_proxy(rollout: Rollout, instance: str) -> Report:
    """Opens the proxy's port to clients, and asks as one of them."""
    report = await containers.open_proxy(rollout)
    await smoke.answers_clients(rollout)
    return report
