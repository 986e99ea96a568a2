"""Create containers."""

from pd_deploy import containers
from pd_deploy.report import Report
from pd_deploy.rollout import Rollout
from tasks.step import step


@step("launch {instance}")
async def launch(rollout: Rollout, instance: str) -> Report:
    """Creates an instance's directories, start script and container."""
    return await containers.launch(rollout, instance)
