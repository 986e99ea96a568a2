"""Remove what is not needed any more."""

from pd_deploy.records.releases import History
from pd_deploy.steps import tidy
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Site
from tasks.step import step


@step("prune {host}")
async def prune(site: Site, host: str, past: History) -> Report:
    """Removes old generations from a host: containers, files, logs and images."""
    return await tidy.prune(site, host, past, past.kept(site.deployment.keep))


@step("clear {host}")
async def clear(site: Site, host: str, past: History) -> Report:
    """Removes everything of the deployment from a host."""
    return await tidy.clear(site, host, past)


@step("stop {host}")
async def stop(site: Site, host: str) -> Report:
    """Stops all containers of the deployment on a host, and keeps them."""
    return await tidy.stop(site, host)
