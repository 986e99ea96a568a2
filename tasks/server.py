"""Start servers, and wait until they are ready."""

from pd_deploy.steps import containers, readiness
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks.step import step


@step("start server {instance}")
async def start_server(rollout: Rollout, instance: str) -> Report:
    """Starts an instance once those it has to follow are started."""
    return await containers.start_server(rollout, instance)


@step("ready {instance}")
async def until_ready(rollout: Rollout, instance: str) -> Report:
    """Waits until an instance is healthy; ends at once when it dies."""
    return await readiness.until_ready(rollout, instance)
