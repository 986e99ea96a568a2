"""Asking a deployment's hosts what serves; nothing is changed, and a host may be away."""

from collections.abc import Awaitable, Callable, Sequence

from pd_deploy.errors import PdDeployError
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.container_values import ListedContainer
from pd_deploy.hosts.host import Host
from pd_deploy.records import status as statuses
from pd_deploy.records.status import Status
from pd_deploy.steps import host_records
from pd_deploy.steps.asking import answer_of
from pd_deploy.steps.host_records import HostRecords
from pd_deploy.steps.session import Session

Listing = Callable[[Host], Awaitable[Sequence[ListedContainer]]]
Answer = tuple[HostRecords, Sequence[ListedContainer]]


async def status(session: Session, listed: Listing | None = None) -> Status:
    """Ask all hosts of a session side by side.

    Args:
        listed: lists all containers of a host; by default, by asking its engine.
    """
    asked = list(session.hosts.values())
    answers = await together(
        answer_of(host, _answer(session, host, listed or _listed)) for host in asked
    )
    records, containers, away = [], {}, {}
    for host, answer in zip(asked, answers, strict=True):
        if isinstance(answer, PdDeployError):
            away[host.address] = answer.unanswered
        else:
            records.append(answer[0])
            containers[host.address] = answer[1]
    past = host_records.merged(records)
    return statuses.status(session.deployment.name, past, containers, away)


async def _answer(session: Session, host: Host, listed: Listing) -> Answer:
    return await host_records.read(host, session.root), await listed(host)


async def _listed(host: Host) -> Sequence[ListedContainer]:
    return await host.docker.listed()
