"""Check a host before anything on it is changed."""

from pd_deploy import preflight as checks
from pd_deploy.report import Report
from pd_deploy.rollout import Rollout
from tasks.step import step


@step("preflight {host}")
async def preflight(rollout: Rollout, host: str) -> Report:
    """Checks paths, devices and ports of a host."""
    return await checks.preflight(rollout, host)
