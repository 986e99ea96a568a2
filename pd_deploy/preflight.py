"""What has to be true of a host before anything on it is changed."""

import asyncio

from pd_deploy import generation
from pd_deploy.errors import FileMissing, HostError, PortTaken
from pd_deploy.hosts import Host
from pd_deploy.report import Report
from pd_deploy.rollout import Rollout


async def preflight(rollout: Rollout, name: str) -> Report:
    """Checks paths, devices and ports of a host, and reports all faults in one error.

    Raises:
        FileMissing, PortTaken: the only fault found.
        HostError: several faults.
    """
    host = rollout.site.host(name)
    checks = await asyncio.gather(_paths(rollout, host, name), _ports(rollout, host, name))
    faults = [fault for found in checks for fault in found]
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise HostError("; ".join(fault.message for fault in faults), host=host.where)
    survey = rollout.surveys[name]
    detail = f"{survey.architecture}, Docker {survey.engine_version}, {survey.interface}"
    return Report("preflight", name, name, False, detail)


async def _paths(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    planned = rollout.plan.hosts[name]
    ours = {*planned.directories, *(d.rpartition("/")[0] for d in planned.directories)}
    specs = planned.containers.values()
    mounts = {m.source for spec in specs for m in spec.mounts} - ours
    devices = {device.partition(":")[0] for spec in specs for device in spec.devices}
    missing = await host.facts.missing_paths(sorted(mounts | devices))
    if not missing:
        return []
    return [
        FileMissing(
            f"expected these paths, which the containers use: {', '.join(sorted(missing))}; "
            "found nothing there",
            path=sorted(missing)[0],
            host=host.where,
            hint="install the driver or model there, or change `container` or `model` in the file",
        )
    ]


async def _ports(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    ours = {
        int(port)
        for container in rollout.surveys[name].containers
        if container.status in generation.RUNNING
        for port in container.labels.get(generation.PORTS, "").split(",")
        if port
    }
    wanted = {
        int(port): instance
        for instance, spec in rollout.plan.hosts[name].containers.items()
        for port in spec.labels[generation.PORTS].split(",")
        if port
    }
    taken = await host.facts.ports_taken(sorted(wanted.keys() - ours))
    return [
        PortTaken(
            f"expected port {port} to be free for {wanted[port]}, "
            f"found that {holder or 'another process'} listens on it",
            host=host.where,
            hint="stop that process, or move the port in the deployment file",
        )
        for port, holder in sorted(taken.items())
    ]
