"""Stop what must not run any longer."""

from pd_deploy.steps import containers
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks.step import step


@step("clean up {instance}")
async def clean_up(rollout: Rollout, instance: str) -> Report:
    """Stops an instance's older or broken containers, and keeps them."""
    return await containers.clean_up(rollout, instance)
