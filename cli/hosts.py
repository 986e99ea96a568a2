"""Planning with what the hosts say."""

from cli.prefect_api import reached
from flows.site import open_site
from pd_deploy import survey
from pd_deploy.deployment import Deployment
from pd_deploy.plan import STAGES, Plan


async def plan(deployment: Deployment) -> Plan:
    """The plan that a deployment would carry out now; changes nothing on the hosts."""
    with reached():
        async with open_site(deployment) as site:
            return (await survey.look(site)).with_actions(STAGES)
