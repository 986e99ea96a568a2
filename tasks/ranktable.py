"""Write ranktables."""

from pd_deploy.steps import containers
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks.step import step


@step("ranktable {host}")
async def write_ranktables(rollout: Rollout, host: str) -> Report:
    """Writes a host's ranktable documents."""
    return await containers.write_ranktables(rollout, host)
