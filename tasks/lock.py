"""Hold off other runs."""

from prefect.logging import get_run_logger

from pd_deploy.steps import locking
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Site
from tasks.step import step


@step("lock")
async def lock(site: Site) -> Report:
    """Takes the deployment's lease on every host; waits for a run that holds it."""
    return await locking.lock(site, get_run_logger().info)
