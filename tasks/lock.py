"""Hold off other runs."""

from prefect.logging import get_run_logger

from pd_deploy.steps import locking
from pd_deploy.steps.report import Report
from pd_deploy.steps.session import LockedSession
from pd_deploy.tasks.step import step


@step("lock")
async def lock(session: LockedSession) -> Report:
    """Takes the deployment's lease on every host; waits for a run that holds it."""
    return await locking.lock(session, get_run_logger().info)
