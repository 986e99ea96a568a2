"""From the deployment file to connected hosts that are locked for a run."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from prefect import runtime

from pd_deploy.blocks.opening import open_former, open_session
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, PdDeployError, Problem
from pd_deploy.flows.dead import bury
from pd_deploy.flows.fan_out import fan_out
from pd_deploy.records.releases import History, HostAccess
from pd_deploy.steps import copies, host_records, locking, promotion
from pd_deploy.steps.session import LockedSession, Session
from pd_deploy.tasks import connect, lock


@asynccontextmanager
async def locked_session(
    deployment: Deployment,
    run: str,
    also: Callable[[History], Iterable[HostAccess]] = lambda _: (),
    forget: Iterable[str] = (),
    *,
    with_key: bool = True,
) -> AsyncIterator[LockedSession]:
    """Connect to the deployment's hosts, former ones included, and lock them for this run.

    Args:
        run: the run, for those who find the hosts locked.
        also: further hosts that the run needs, from the deployment's past.
        forget: addresses of former hosts that are gone for good.
        with_key: whether the run is going to ask the service for anything.
    """
    opening = open_session(deployment, forget, with_key=with_key)
    async with opening as opened, locked(opened, run, also) as session:
        yield session


@asynccontextmanager
async def locked(
    session: Session, run: str, also: Callable[[History], Iterable[HostAccess]] = lambda _: ()
) -> AsyncIterator[LockedSession]:
    """Lock the hosts of a session; see `locked_session`."""
    history = await connected(session)
    copies.require_no_hold(session, history)  # a run need not wait for others to be told that
    _require_former(session, history)
    await open_former(session, history, also(history))
    lease = locking.lease_for(session, run, str(runtime.flow_run.id), history.lease)
    with_lease = LockedSession.of(session, lease)
    async with lease.held(with_lease.hosts):
        await lock(with_lease)
        for owner in {owner.flow_run: owner for owner in lease.dead}.values():
            await bury(owner, run)
        began = datetime.now(UTC)
        try:
            yield with_lease
        except PdDeployError as error:
            await promotion.note_run(with_lease, error, run, began)
            raise


def patient(deployment: Deployment, seconds: float) -> Deployment:
    """Let a run wait longer for the deployment's leases than somebody at a prompt would."""
    gates = deployment.gates.model_copy(update={"lease": max(seconds, deployment.gates.lease)})
    return deployment.model_copy(update={"gates": gates})


def _require_former(session: Session, history: History) -> None:
    """Refuse to forget what is no host that the deployment has left.

    Raises:
        InvalidInput: each such address.
    """
    present = {host.address for host in session.hosts.values()}
    former = sorted(history.record.hosts.keys() - present)
    problems = [
        Problem(
            "forget",
            f"expected the address of a host that has left the file "
            f"({', '.join(former) or 'there is none'}), found {address!r}",
        )
        for address in sorted(session.forgotten)
        if address not in former
    ]
    if problems:
        raise InvalidInput(problems)


async def connected(session: Session) -> History:
    """Connect to all hosts; return what was deployed on them before."""
    return host_records.merged(
        await fan_out(session.barrier, [connect(session, name) for name in list(session.hosts)])
    )
