"""Write ranktables."""

from pd_deploy import containers
from pd_deploy.report import Report
from pd_deploy.rollout import Rollout
from tasks.step import step


@step("ranktable {host}")
async def write_ranktables(rollout: Rollout, host: str) -> Report:
    """Writes a host's ranktable documents."""
    return await containers.write_ranktables(rollout, host)
