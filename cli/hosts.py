"""Reading from the hosts, without a flow run."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from pd_deploy.blocks.opening import open_former, open_session, session_on
from pd_deploy.cli.prefect_api import reached
from pd_deploy.config.models import Deployment
from pd_deploy.errors import PdDeployError
from pd_deploy.flows import survey
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.container_values import ContainerState, ListedContainer
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.planning.plans import STAGES, Plan
from pd_deploy.records import generations
from pd_deploy.records.releases import History, HostAccess
from pd_deploy.records.status import Status
from pd_deploy.steps import host_records
from pd_deploy.steps.session import Session
from pd_deploy.steps.status import status

AT_ONCE = 32  # deployments whose hosts are asked at the same time


def plan(deployment: Deployment, image: str | None) -> Plan:
    """Make the plan that a deployment would carry out now; change nothing on the hosts."""

    async def survey_hosts() -> Plan:
        async with connected(deployment) as (session, _):
            return (await survey.plan(session, image, "a look")).with_actions(STAGES)

    with reached():
        return asyncio.run(survey_hosts())


def read_history(deployment: Deployment) -> tuple[History, list[ContainerState]]:
    """Read from the hosts what was deployed and what became of it, and which containers run."""
    label = {generations.DEPLOYMENT: deployment.name}

    async def read() -> tuple[History, list[ContainerState]]:
        async with connected(deployment) as (session, recorded):
            states = await together(h.docker.containers(label) for h in session.hosts.values())
            return recorded, [s for host in states for s in host if s.status in generations.RUNNING]

    with reached():
        return asyncio.run(read())


def read_statuses(deployments: Iterable[Deployment]) -> list[Status | PdDeployError]:
    """Ask the hosts of many deployments what serves; see `statuses`."""
    with reached():
        return asyncio.run(statuses(deployments))


async def statuses(deployments: Iterable[Deployment]) -> list[Status | PdDeployError]:
    """Ask all hosts of all deployments side by side what serves; each host is listed once.

    Returns:
        For each deployment its status, or why its hosts could not be asked.
    """
    shared: dict[HostAccess, Host] = {}
    listings: dict[Host, asyncio.Future[list[ListedContainer]]] = {}
    turns = asyncio.Semaphore(AT_ONCE)

    async def listed(host: Host) -> list[ListedContainer]:
        if host not in listings:
            listings[host] = asyncio.ensure_future(host.docker.listed())
        return await listings[host]

    async def asked(deployment: Deployment) -> Status | PdDeployError:
        async with turns:
            try:
                return await status(await session_on(shared, deployment), listed)
            except PdDeployError as error:
                return error

    try:
        return await together(map(asked, deployments))
    finally:
        for listing in listings.values():
            listing.cancel()
        await Hosts.of({str(access): host for access, host in shared.items()}).aclose()


@asynccontextmanager
async def connected(deployment: Deployment) -> AsyncIterator[tuple[Session, History]]:
    """Connect to a deployment's hosts, former ones included, and read its history."""
    async with open_session(deployment) as session:
        reading = [host_records.read(host, session.root) for host in session.hosts.values()]
        recorded = host_records.merged(await together(reading))
        await open_former(session, recorded)
        yield session, recorded
