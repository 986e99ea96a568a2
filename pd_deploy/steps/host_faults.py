"""What of a host keeps a server from running: devices and ports that others hold, a full disk,
files that are gone, Docker that started again. Changes nothing.

A server that ends because of these says nothing about its image.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pd_deploy.errors import (
    ContainerMissing,
    DiskFull,
    DockerRestarted,
    FileMissing,
    HostError,
    InUse,
)
from pd_deploy.hosts.concurrent import task_group, together
from pd_deploy.hosts.host import Host
from pd_deploy.planning.plans import InstancePlan
from pd_deploy.records import generations
from pd_deploy.steps.rollout import Rollout

FULL_BYTES = 1 << 20
"""With less than this free, a disk is full: programs fail at their next write."""


@dataclass(frozen=True)
class Holder:
    """Who has a device or a port.

    Attributes:
        kind: `device` or `port`.
        number: of the device or port.
        who: the process, and its container if it is in one.
        is_stranger: whether it is known to live on, and to be none of this deployment's.
        is_ours: whether it is known to be this deployment's, or of the service that it takes over.
        container: the name of its container; empty for none.
    """

    kind: str
    number: int
    who: str
    is_stranger: bool
    is_ours: bool = False
    container: str = ""

    @property
    def what(self) -> str:
        """E.g. `port 9000`."""
        return f"{self.kind} {self.number}"

    def __str__(self) -> str:
        return f"{self.what} with {self.who}"


async def holders(
    rollout: Rollout, host: Host, devices: Iterable[int], ports: Iterable[int]
) -> list[Holder]:
    """List who has devices and ports of a host; not who holds a port for the new proxy."""
    devices, ports = sorted(devices), sorted(ports)
    async with task_group() as group:
        device_holders = group.create_task(device_users(rollout, host, devices))
        port_holders = group.create_task(host.facts.ports_taken(ports))
    uses = [("device", *user) for user in sorted(device_holders.result().items())]
    uses += [("port", *holder) for holder in sorted(port_holders.result().items())]
    pids = sorted({pid for *_, who in uses if (pid := _pid(who))})
    homes = await host.facts.containers_of(pids)
    containers = {id_: await _container(rollout, host, id_) for id_ in set(homes.values()) if id_}
    holding = []
    for kind, number, who in uses:
        pid = _pid(who)
        name, is_ours, role = containers.get(homes.get(pid or 0, ""), ("", False, ""))
        if is_ours and role == generations.WAITING_ROOM:
            continue
        shown = who.replace(")", f", container {name})") if name else who
        is_stranger = pid in homes and not is_ours
        holding.append(Holder(kind, number, shown or "a process", is_stranger, is_ours, name))
    return holding


async def device_users(rollout: Rollout, host: Host, devices: list[int]) -> dict[int, str]:
    """List those of a host's devices that somebody uses, with whom the engine's tool names."""
    engine = rollout.session.engine
    command = engine.device_users_command()
    if not command or not devices:
        return {}
    return dict(engine.device_users(await host.output(command), devices, host.where))


async def restarted(rollout: Rollout) -> list[str]:
    """List the hosts, with when, whose Docker started again after a container of the generation had
    started, which has ended: with Docker end its containers, and servers elsewhere that have links
    to them."""
    names = list(rollout.plan.hosts)
    ages = await together(_restart(rollout, name) for name in names)
    return [
        f"host {rollout.session.host(name).where} {age:.0f} s ago"
        for name, age in zip(names, ages, strict=True)
        if age is not None
    ]


async def _restart(rollout: Rollout, name: str) -> float | None:
    """Tell how many seconds ago a host's Docker started again, if it did."""
    host, deployment = rollout.session.host(name), rollout.session.deployment.name
    planned = {one.container.name for one in rollout.plan.hosts[name].instances.values()}
    async with task_group() as group:
        listed = group.create_task(host.docker.containers({generations.DEPLOYMENT: deployment}))
        looked = group.create_task(host.facts.docker_age(host.docker_socket))
    age = looked.result()
    starts = [
        state.started_at.timestamp()
        for state in listed.result()
        if state.name in planned and state.status in generations.ENDED and state.started_at
    ]
    return age.seconds if any(age.now - start > age.seconds for start in starts) else None


async def of_instance(rollout: Rollout, instance: str) -> HostError | None:
    """Find what keeps an instance from running that is its host's fault, and not its image's."""
    host, plan = rollout.session.host_of(instance), rollout.plan.instance(instance)
    async with task_group() as group:
        held = group.create_task(holders(rollout, host, plan.devices, plan.ports))
        full = group.create_task(_full(rollout, host))
        missing = group.create_task(_missing(host, plan))
        restarts = group.create_task(restarted(rollout))
    if restarts.result():
        return DockerRestarted(
            f"found that Docker was restarted on {', '.join(restarts.result())}, which "
            "ends its containers",
            host=host.where,
        )
    if strangers := [str(holder) for holder in held.result() if holder.is_stranger]:
        return InUse(f"found {', '.join(strangers)}", host=host.where, hint="stop what uses them")
    if full.result():
        return DiskFull(f"found no space left at {', '.join(full.result())}", host=host.where)
    if missing.result():
        return FileMissing(
            f"found nothing at {', '.join(missing.result())}, which its container uses",
            path=missing.result()[0],
            host=host.where,
        )
    return None


async def _container(rollout: Rollout, host: Host, container: str) -> tuple[str, bool, str]:
    """Return a container's name, whether it is this deployment's, and its role there."""
    try:
        state = await host.docker.inspect(container)
    except ContainerMissing:
        return "", False, ""
    adopted = rollout.history.record.adopted
    is_ours = state.labels.get(generations.DEPLOYMENT) == rollout.session.deployment.name
    is_ours |= adopted is not None and state.id in adopted.ids()
    return state.name, is_ours, state.labels.get(generations.ROLE, "")


async def _full(rollout: Rollout, host: Host) -> list[str]:
    paths = rollout.session.deployment.paths
    directories = sorted({paths.state, paths.logs})
    free_bytes = await host.facts.disk_free(*directories)
    return [path for path, free in zip(directories, free_bytes, strict=True) if free < FULL_BYTES]


async def _missing(host: Host, plan: InstancePlan) -> list[str]:
    sources = {mount.source for mount in plan.container.mounts}
    devices = {device.partition(":")[0] for device in plan.container.devices}
    return await host.facts.missing_paths(sorted(sources | devices))


def _pid(who: str) -> int | None:
    named = re.search(r"\(pid (\d+)\)", who)
    return int(named[1]) if named else None
