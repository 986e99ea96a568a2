"""Taking a deployment's leases: for whom, and what they claim on each host."""

from collections.abc import Callable

from pd_deploy.errors import TransientError
from pd_deploy.hosts.lease import Lease, Owner, this_process
from pd_deploy.steps import copies
from pd_deploy.steps.report import Report
from pd_deploy.steps.session import LockedSession, Session


def lease_for(session: Session, run: str, flow_run: str, floor: int) -> Lease:
    """Make a lease, not yet taken, for a run on a session.

    Args:
        flow_run: the run's id at the server.
        floor: the highest number that a lease of the deployment is known to have had.
    """
    owner = Owner(deployment=session.deployment.name, run=run, flow_run=flow_run, **this_process())
    return Lease(session.root, owner, session.deployment.gates.lease_lasts, floor)


async def lock(session: LockedSession, waiting: Callable[[str], None]) -> Report:
    """Take the leases of all hosts of a session, and write again what a host has lost.

    Raises:
        LeaseHeld: another run works on the deployment.
    """
    hosts = [
        (host, _claim(session, session.lease.owner, name)) for name, host in session.hosts.items()
    ]
    try:
        await session.lease.take(hosts, session.deployment.gates.lease, waiting)
    except TransientError as error:
        for name in session.former:
            if error.host == session.host(name).where:
                error.hint = (
                    "it is no longer in the file, but the deployment may still run there; if it "
                    "is gone for good: "
                    f"`pd-deploy deploy FILE --forget {session.host(name).address}`"
                )
        raise
    written = await copies.complete(session)
    detail = f"on {', '.join(session.hosts)}"
    if written:
        detail += f"; wrote again {', '.join(written)}"
    return Report("lock", session.deployment.name, "", bool(written), detail)


def _claim(session: Session, owner: Owner, host: str) -> Owner:
    """Add what the run is going to use on a host."""
    topology = session.topology
    instances = topology.on_host(host)
    ports = [port for i in instances for port in i.ports.values()]
    ports += [*topology.proxy.ports.values()] if topology.proxy.host == host else []
    devices = [device for i in instances for device in i.devices]
    return owner.model_copy(update={"ports": tuple(ports), "devices": tuple(devices)})
