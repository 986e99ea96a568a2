"""Looking at the hosts, without a flow run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pd_deploy.cli.prefect_api import reached
from pd_deploy.config.models import Deployment
from pd_deploy.flows import survey
from pd_deploy.flows.session import open_former, open_session
from pd_deploy.planning.plans import STAGES, Plan
from pd_deploy.records.releases import History
from pd_deploy.steps import history
from pd_deploy.steps.session import Session


def plan(deployment: Deployment, image: str | None) -> Plan:
    """The plan that a deployment would carry out now; changes nothing on the hosts."""

    async def look() -> Plan:
        async with looked_at(deployment) as (session, _):
            return (await survey.plan(session, image, "a look")).with_actions(STAGES)

    with reached():
        return asyncio.run(look())


def past(deployment: Deployment) -> History:
    """What was deployed before, and what became of it."""

    async def look() -> History:
        async with looked_at(deployment) as (_, found):
            return found

    with reached():
        return asyncio.run(look())


@asynccontextmanager
async def looked_at(deployment: Deployment) -> AsyncIterator[tuple[Session, History]]:
    """The deployment's hosts, former ones included, and its past."""
    async with open_session(deployment) as session:
        reading = [history.read(host, session.root) for host in session.hosts.values()]
        found = history.merged(await asyncio.gather(*reading))
        await open_former(session, found)
        yield session, found
