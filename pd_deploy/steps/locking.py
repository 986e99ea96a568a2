"""Taking a deployment's leases: for whom, and what they claim on each host."""

from collections.abc import Callable

from pd_deploy.errors import TransientError
from pd_deploy.hosts.lease import Lease, Owner, this_process
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Site


def lease_for(site: Site, run: str) -> Lease:
    """A lease, not yet taken, for a run on a site."""
    owner = Owner(deployment=site.deployment.name, run=run, **this_process())
    return Lease(site.root, owner, site.deployment.gates.lease_lasts)


async def lock(site: Site, waiting: Callable[[str], None]) -> Report:
    """Takes the leases of all hosts of a site.

    Raises:
        LeaseHeld: another run works on the deployment.
    """
    assert site.lease is not None
    hosts = [(host, _claim(site, site.lease.owner, name)) for name, host in site.hosts.items()]
    try:
        await site.lease.take(hosts, site.deployment.gates.lease, waiting)
    except TransientError as error:
        for name in site.former:
            if error.host == site.host(name).where:
                error.hint = (
                    "it has left the file, but the deployment may still run there; if it is gone "
                    f"for good: `pd-deploy deploy FILE --forget {site.host(name).address}`"
                )
        raise
    return Report("lock", site.deployment.name, "", False, f"on {', '.join(site.hosts)}")


def _claim(site: Site, owner: Owner, host: str) -> Owner:
    """What the run is going to use on a host."""
    topology = site.topology
    instances = [i for i in topology.instances if i.host == host]
    ports = [port for i in instances for port in i.ports.values()]
    ports += [topology.proxy.port] if topology.proxy.host == host else []
    devices = [device for i in instances for device in i.devices]
    return owner.model_copy(update={"ports": tuple(ports), "devices": tuple(devices)})
