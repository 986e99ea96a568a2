"""Create containers."""

from pd_deploy.steps import containers
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks.step import step


@step("launch {instance}")
async def launch(rollout: Rollout, instance: str) -> Report:
    """Creates an instance's directories, start script and container."""
    return await containers.launch(rollout, instance)
