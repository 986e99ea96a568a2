"""Record what is attempted and what serves."""

from pd_deploy.steps import promotion
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.tasks.step import step


@step("save {host}")
async def save(rollout: Rollout, host: str) -> Report:
    """Writes a generation's account of itself on a host, before anything of it is made."""
    return await promotion.save(rollout, host)


@step("promote")
async def promote(rollout: Rollout, by: str) -> Report:
    """Makes the generation the one that serves."""
    return await promotion.promote(rollout, by)
