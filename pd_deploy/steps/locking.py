"""Taking a deployment's leases: for whom, and what they claim on each host."""

from collections.abc import Callable

from pd_deploy.errors import NoSuchGeneration, OnHold, TransientError
from pd_deploy.hosts.lease import Lease, Owner, this_process
from pd_deploy.records.benchmark import Figures
from pd_deploy.records.releases import Hold
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
        OnHold: somebody keeps all runs from working on it.
    """
    await _take(session, waiting)
    written = await copies.complete(session)
    detail = f"on {', '.join(session.hosts)}"
    if written:
        detail += f"; wrote again {', '.join(written)}"
    return Report("lock", session.deployment.name, "", bool(written), detail)


async def set_hold(
    session: LockedSession, hold: Hold | None, waiting: Callable[[str], None]
) -> Hold | None:
    """Keep all runs from working on a deployment, or let them again; return the hold before.

    It is written while no run works there, and stays until it is taken away: no process has to.

    Raises:
        LeaseHeld: a run works on the deployment.
        NoSuchGeneration: nothing was ever deployed.
        OnHold: somebody else keeps runs from working on it, for a reason of theirs.
    """
    await _take(session, waiting)
    record = await copies.read_record(session)
    if not record.sequence:
        raise NoSuchGeneration(
            f"expected a record of what was deployed below {session.root}, found none on any host",
            hint="hold a deployment once it was deployed",
        )
    if hold and record.hold and record.hold.by != hold.by:
        raise OnHold(
            f"expected a deployment that nobody else holds, found it held by {record.hold}",
            hint="it stays held; `pd-deploy lock release FILE` ends that once its reason is gone",
        )
    await copies.write_record(session, copies.hosts_in_order(session), record.held(hold))
    return record.hold


async def save_figures(
    session: LockedSession, figures: Figures, waiting: Callable[[str], None]
) -> None:
    """Add figures of what serves to the record, for later ones to be compared with.

    Whoever saves them wants them for a baseline: they count as let through.

    Raises:
        LeaseHeld: a run works on the deployment.
    """
    await _take(session, waiting)
    passed = figures.model_copy(update={"passed": True})
    await copies.change_record(session, lambda record: record.measured(passed))


async def _take(session: LockedSession, waiting: Callable[[str], None]) -> None:
    """Take the leases of all hosts of a session."""
    hosts = [
        (host, _claim(session, session.lease.owner, name)) for name, host in session.hosts.items()
    ]
    try:
        await session.lease.take(hosts, session.deployment.gates.lease, waiting)
    except TransientError as error:
        session.tell_if_former(error)
        raise


def _claim(session: Session, owner: Owner, host: str) -> Owner:
    """Add what the run is going to use on a host."""
    topology = session.topology
    instances = topology.on_host(host)
    ports = [port for i in instances for port in i.ports.values()]
    ports += [port for proxy in topology.proxies_on(host) for port in proxy.ports.values()]
    devices = [device for i in instances for device in i.devices]
    return owner.model_copy(update={"ports": tuple(ports), "devices": tuple(devices)})
