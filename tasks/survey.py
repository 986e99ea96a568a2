"""Read what a plan needs to know of a host."""

from pd_deploy.steps import history, surveying
from pd_deploy.steps.history import Found
from pd_deploy.steps.rollout import Site, Survey
from pd_deploy.steps.surveying import Addresses
from tasks.step import step


@step("connect {host}")
async def connect(site: Site, host: str) -> Found:
    """Connects to a host and reads what was deployed on it before."""
    return await history.read(site.host(host), site.root)


@step("survey {host}")
async def survey(site: Site, host: str) -> Survey:
    """Reads a host's facts, what runs there, and what was deployed there before."""
    return await surveying.survey(site, host)


@step("device addresses {host}")
async def device_addresses(site: Site, host: str) -> Addresses:
    """Reads the network address of every device that is used on a host."""
    return await surveying.device_addresses(site, host)
