"""Reading from the hosts, without a flow run."""

import asyncio
import sys
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pd_deploy.blocks import server
from pd_deploy.blocks.opening import names_blocks, open_former, open_session, session_on
from pd_deploy.config.models import Deployment
from pd_deploy.errors import HostUnreachable, PdDeployError
from pd_deploy.hosts.concurrent import together
from pd_deploy.hosts.container_values import ContainerState, ListedContainer
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.records import generations
from pd_deploy.records.releases import History, HostAccess
from pd_deploy.records.status import Status
from pd_deploy.records.status import status as judge
from pd_deploy.steps import host_records
from pd_deploy.steps.asking import answer_of, promptly
from pd_deploy.steps.host_records import HostRecords
from pd_deploy.steps.session import Session
from pd_deploy.steps.status import status

T = TypeVar("T")

AT_ONCE = 32  # deployments whose hosts are asked at the same time


@contextmanager
def asking(deployments: Iterable[Deployment]) -> Iterator[None]:
    """Turn errors of the Prefect server into ours, where deployments have credentials there.

    Prefect, which takes a second to load, is not loaded for it.
    """
    if not any(map(names_blocks, deployments)):
        yield
        return
    server.spare_the_proxy(server.url(server.settings()))
    try:
        yield
    except Exception:
        if "prefect" not in sys.modules:
            raise
        from pd_deploy.cli.prefect_api import reached

        with reached():
            raise


@dataclass(frozen=True)
class Past:
    """What was deployed and what became of it, and what runs.

    Attributes:
        running: the containers that run.
        away: why hosts did not answer.
    """

    history: History
    running: Sequence[ContainerState]
    status: Status
    away: Sequence[str] = ()


def read_past(deployment: Deployment) -> Past:
    """Read from the hosts what was deployed and what became of it, and which containers run."""
    with asking([deployment]):
        return asyncio.run(past(deployment))


async def past(deployment: Deployment) -> Past:
    """Read a deployment's past from the hosts that answer; see `read_past`."""
    label = {generations.DEPLOYMENT: deployment.name}

    async with connected(deployment) as connection:
        adopted = connection.history.record.adopted

        async def containers(name: str) -> list[ContainerState]:
            host = connection.session.host(name)
            ids = [c.id for c in adopted.containers if c.host == host.address] if adopted else []
            return [*await host.docker.containers(label), *await host.docker.states(ids)]

        answers, reached = await connection.ask(containers)
        states = {reached.session.host(name).address: answer for name, answer in answers.items()}
    told = {address: error.unanswered for address, error in reached.away.items()}
    running = [s for host in states.values() for s in host if s.status in generations.RUNNING]
    judged = judge(deployment.name, reached.history, states, told)
    return Past(reached.history, running, judged, list(told.values()))


def read_statuses(deployments: Iterable[Deployment]) -> list[Status | PdDeployError]:
    """Ask the hosts of many deployments what serves; see `statuses`."""
    deployments = list(deployments)
    with asking(deployments):
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
            listings[host] = asyncio.ensure_future(promptly(host, host.docker.listed()))
        # Those who stop waiting for it leave it to the others.
        return await asyncio.shield(listings[host])

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


@dataclass(frozen=True)
class Reached:
    """The hosts of a deployment that answer, former ones included, and what they know of its past.

    Attributes:
        session: with those hosts alone.
        away: by address, why each of the others does not answer.
    """

    session: Session
    history: History
    away: Mapping[str, PdDeployError]

    async def ask(
        self, question: Callable[[str], Coroutine[Any, Any, T]]
    ) -> tuple[dict[str, T], "Reached"]:
        """Ask all of its hosts at the same time, each by its name.

        Returns:
            What they answer, and the hosts that do; the others are away.
        """
        hosts = self.session.hosts
        asked = (answer_of(host, question(name)) for name, host in hosts.items())
        both = dict(zip(hosts, await together(asked), strict=True))
        answers = {name: a for name, a in both.items() if not isinstance(a, PdDeployError)}
        away = {hosts[n].address: a for n, a in both.items() if isinstance(a, PdDeployError)}
        here = Hosts.of({name: hosts[name] for name in answers})
        reached = replace(self, session=self.session.with_hosts(here), away={**self.away, **away})
        return answers, reached

    def require_all(self) -> None:
        """Refuse to go on without a host; tell of each one whether it answers.

        Raises:
            HostUnreachable: hosts are away.
        """
        if not self.away:
            return
        rows = [f"host {host.where}: answers" for host in self.session.hosts.values()]
        rows += [error.headline for error in self.away.values()]
        hints = dict.fromkeys(error.hint for error in self.away.values() if error.hint)
        message = "\n  ".join(["expected every host to answer, found:", *rows])
        raise HostUnreachable(message, hint="; ".join(hints) or None)


@asynccontextmanager
async def connected(deployment: Deployment, *, with_key: bool = False) -> AsyncIterator[Reached]:
    """Connect to a deployment's hosts, former ones included, and read its history.

    Args:
        with_key: whether the service is going to be asked what it wants a key for.

    Raises:
        HostUnreachable: no host answers.
    """
    async with open_session(deployment, with_key=with_key) as session:
        answers = await _records(session, list(session.hosts))
        recorded = host_records.merged(a for a in answers.values() if isinstance(a, HostRecords))
        present = set(session.hosts)
        await open_former(session, recorded)
        answers |= await _records(session, [name for name in session.hosts if name not in present])
        away = {
            session.host(name).address: answer
            for name, answer in answers.items()
            if isinstance(answer, PdDeployError)
        }
        here = {n: h for n, h in session.hosts.items() if h.address not in away}
        history = host_records.merged(a for a in answers.values() if isinstance(a, HostRecords))
        reached = Reached(session.with_hosts(Hosts.of(here)), history, away)
        if not here:
            reached.require_all()
        yield reached


async def _records(
    session: Session, names: Iterable[str]
) -> dict[str, HostRecords | PdDeployError]:
    async def read(name: str) -> HostRecords | PdDeployError:
        host = session.host(name)
        return await answer_of(host, host_records.read(host, session.root))

    names = list(names)
    return dict(zip(names, await together(map(read, names)), strict=True))
