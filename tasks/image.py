"""Resolve the image, and bring it to a host."""

from pd_deploy import containers, survey
from pd_deploy.report import Report
from pd_deploy.rollout import Rollout, Site
from pd_deploy.survey import ResolvedImage
from tasks.step import step


@step("resolve image")
async def resolve_image(site: Site) -> ResolvedImage:
    """Finds the digest behind the file's tag, once for all hosts."""
    return await survey.resolve_image(site)


@step("pull image {host}")
async def pull_image(rollout: Rollout, host: str) -> Report:
    """Brings the image to a host unless it is there."""
    return await containers.pull(rollout, host)
