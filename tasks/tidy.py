"""Remove what is not needed any more."""

from pd_deploy.records.releases import History
from pd_deploy.steps import tidy
from pd_deploy.steps.report import Report
from pd_deploy.steps.session import LockedSession
from pd_deploy.tasks.step import step


@step("prune {host}")
async def prune(session: LockedSession, host: str, past: History) -> Report:
    """Removes old generations from a host: containers, files, logs and images."""
    return await tidy.prune(session, host, past, past.kept(session.deployment.keep))


@step("clear {host}")
async def clear(session: LockedSession, host: str, past: History) -> Report:
    """Removes everything of the deployment from a host."""
    return await tidy.clear(session, host, past)


@step("stop {host}")
async def stop(session: LockedSession, host: str) -> Report:
    """Stops all containers of the deployment on a host, and keeps them."""
    return await tidy.stop(session, host)
