"""Read what a plan needs to know of a host."""

from pd_deploy.steps import history, surveying
from pd_deploy.steps.history import HostRecords
from pd_deploy.steps.rollout import HostState
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import Addresses
from pd_deploy.tasks.step import step


@step("connect {host}")
async def connect(session: Session, host: str) -> HostRecords:
    """Connects to a host and reads what was deployed on it before."""
    return await history.read(session.host(host), session.root)


@step("survey {host}")
async def survey(session: Session, host: str) -> HostState:
    """Reads a host's facts, what runs there, and what was deployed there before."""
    return await surveying.survey(session, host)


@step("device addresses {host}")
async def device_addresses(session: Session, host: str) -> Addresses:
    """Reads the network address of every device that is used on a host."""
    return await surveying.device_addresses(session, host)
