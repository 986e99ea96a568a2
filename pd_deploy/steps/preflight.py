"""What has to be true of a host before anything on it is changed."""

import asyncio
from collections.abc import Iterator
from pathlib import PurePosixPath

from pd_deploy.errors import DiskFull, FileMissing, HostError, InUse, PortTaken
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.lease import Owner
from pd_deploy.records import generations
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout

MIB = 1 << 20
GIB = 1 << 30
# Plan, scripts, ranktables and record of a generation take some 100 KiB.
STATE_BYTES = MIB


async def preflight(rollout: Rollout, name: str) -> Report:
    """Check paths, disk, devices and ports of a host, and report all faults in one error.

    Raises:
        FileMissing, DiskFull, InUse, PortTaken: the only fault found.
        HostError: several faults.
    """
    host = rollout.session.host(name)
    checks = await asyncio.gather(
        _paths(rollout, host, name),
        _disk(rollout, host, name),
        _devices(rollout, host, name),
        _ports(rollout, host, name),
    )
    faults = [fault for faults_of_check in checks for fault in faults_of_check]
    faults += _of_other_deployments(rollout, host, name)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise HostError("; ".join(fault.message for fault in faults), host=host.where)
    state = rollout.states[name]
    detail = f"{state.architecture}, Docker {state.docker_version}, {state.interface}"
    return Report("preflight", name, name, False, detail)


async def until_free(rollout: Rollout, name: str) -> Report:
    """Wait until the devices and ports that stopped containers had are really free.

    Raises:
        InUse: they are not within `gates.free`; says who holds them.
    """
    session, host = rollout.session, rollout.session.host(name)
    try:
        async with asyncio.timeout(session.deployment.gates.free) as limit:
            # An asyncio.Event can't be set from another machine
            while busy := await _busy(rollout, host, name):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        if not limit.expired():
            raise
        raise InUse(
            f"expected devices and ports to be free within {session.deployment.gates.free:g} s "
            f"after the old generation stopped, found {', '.join(busy)}",
            host=host.where,
            hint="end what holds them, or raise gates.free",
        ) from None
    return Report("free", name, name, False, "devices and ports are free")


POLL_S = 0.25


async def _busy(rollout: Rollout, host: Host, name: str) -> list[str]:
    """List who still has something that the servers about to start need."""
    starting = rollout.to_start(name)
    devices = {device for instance in starting for device in instance.devices}
    ports = {port for instance in starting for port in instance.ports}
    users, taken = await asyncio.gather(
        _users(rollout, host, devices), host.facts.ports_taken(sorted(ports))
    )
    busy = [f"device {device} with {user}" for device, user in sorted(users.items())]
    return busy + [f"port {p} with {who or 'a process'}" for p, who in sorted(taken.items())]


async def _users(rollout: Rollout, host: Host, devices: set[int]) -> dict[int, str]:
    engine = rollout.session.engine
    command = engine.device_users_command()
    if not command or not devices:
        return {}
    return dict(engine.device_users(await host.output(command), sorted(devices), host.where))


async def _paths(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    plan = rollout.plan.hosts.get(name)
    if plan is None:
        return []
    # Containers mount the parents: all instances' directories of a generation, and of its logs.
    ours = {*plan.directories, *(str(PurePosixPath(path).parent) for path in plan.directories)}
    specs = [instance.container for instance in plan.instances.values()]
    mounts = {mount.source for spec in specs for mount in spec.mounts} - ours
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


async def _disk(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    """Find out where the host lacks room for what is going to be written.

    A generation that has served has all its files: a full disk must not keep it from coming back.
    """
    deployment, state = rollout.session.deployment, rollout.states[name]
    if name not in rollout.plan.hosts:
        return []
    needed = []
    if rollout.plan.generation not in rollout.history.good:
        needed += [
            ("its state", deployment.paths.state, STATE_BYTES),
            ("logs", deployment.paths.logs, deployment.disk.logs),
        ]
    if await host.docker.image(rollout.plan.pinned_image) is None:
        needed.append(("the image", state.docker_root, deployment.disk.image))
    free = await asyncio.gather(*(host.facts.disk_free(path) for _, path, _ in needed))
    return [
        DiskFull(
            f"expected {_shown(least, least)} free for {purpose} at {path}, "
            f"found {_shown(free_bytes, least)}",
            host=host.where,
            hint="free some (`pd-deploy prune FILE` removes old generations), or change `disk`",
        )
        for (purpose, path, least), free_bytes in zip(needed, free, strict=True)
        if free_bytes < least
    ]


def _shown(size: int, scale: int) -> str:
    return f"{size / GIB:.1f} GiB" if scale >= GIB else f"{size / MIB:.1f} MiB"


async def _devices(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    """Find devices in use by anything but this deployment's running containers."""
    wanted, ours = _labelled(rollout, name, generations.DEVICES)
    users = await _users(rollout, host, wanted.keys() - ours)
    return [
        InUse(
            f"expected device {device} to be free for {wanted[device]}, found {user} on it",
            host=host.where,
            hint="end that process, or use other devices",
        )
        for device, user in sorted(users.items())
    ]


async def _ports(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    wanted, ours = _labelled(rollout, name, generations.PORTS)
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


def _labelled(rollout: Rollout, name: str, label: str) -> tuple[dict[int, str], set[int]]:
    """Return the ports or devices of a host that the plan wants, each with the instance that does,
    and those that the deployment's running containers have."""
    plan = rollout.plan.hosts.get(name)
    wanted = {
        number: instance_name
        for instance_name, instance in (plan.instances.items() if plan else ())
        for number in generations.numbers(instance.container.labels[label])
    }
    running = [c for c in rollout.states[name].containers if c.status in generations.RUNNING]
    return wanted, {n for c in running for n in generations.numbers(c.labels.get(label, ""))}


def _of_other_deployments(rollout: Rollout, host: Host, name: str) -> Iterator[HostError]:
    """Find devices and ports that another deployment's containers have, or its run claims."""
    claims = [(_holder(state), _uses(state)) for state in rollout.states[name].others]
    for other in rollout.locked.lease.others.get(host.address, []):
        if other.age < rollout.session.deployment.gates.lease_lasts:
            claims.append((f"{other.owner.run}, which is at work", _claimed(other.owner)))
    for label in (generations.DEVICES, generations.PORTS):
        wanted, _ = _labelled(rollout, name, label)
        for holder, used in claims:
            shared = sorted(wanted.keys() & used[label])
            if shared:
                yield InUse(
                    f"expected the {label.rpartition('.')[2]} {', '.join(map(str, shared))} to be "
                    f"this deployment's, found that {holder} uses them",
                    host=host.where,
                    hint="tear that deployment down, or change devices or ports in the file",
                )


def _holder(state: ContainerState) -> str:
    return f"{state.name} of deployment {state.labels[generations.DEPLOYMENT]}"


def _uses(state: ContainerState) -> dict[str, set[int]]:
    return {
        label: generations.numbers(state.labels.get(label, ""))
        for label in (generations.DEVICES, generations.PORTS)
    }


def _claimed(owner: Owner) -> dict[str, set[int]]:
    return {generations.DEVICES: set(owner.devices), generations.PORTS: set(owner.ports)}
