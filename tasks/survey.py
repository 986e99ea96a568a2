"""Read what a plan needs to know of a host."""

from pd_deploy import survey as reading
from pd_deploy.rollout import Site, Survey
from pd_deploy.survey import Addresses
from tasks.step import step


@step("survey {host}")
async def survey(site: Site, host: str) -> Survey:
    """Connects to a host and reads its facts and what runs there."""
    return await reading.survey(site, host)


@step("device addresses {host}")
async def device_addresses(site: Site, host: str) -> Addresses:
    """Reads the network address of every device that is used on a host."""
    return await reading.device_addresses(site, host)
