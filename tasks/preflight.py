"""Check a host before anything on it is changed, and before servers start on it."""

from pd_deploy.steps import preflight as checks
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks.step import step


@step("preflight {host}")
async def preflight(rollout: Rollout, host: str) -> Report:
    """Checks paths, disk, devices and ports of a host."""
    return await checks.preflight(rollout, host)


@step("free {host}")
async def until_free(rollout: Rollout, host: str) -> Report:
    """Waits until the devices and ports of stopped servers are really free."""
    return await checks.until_free(rollout, host)
