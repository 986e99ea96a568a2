"""What has to be true of hosts before anything on them is changed."""

import asyncio
import logging
import posixpath
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pd_deploy.errors import FileDenied, FileMissing, HostError, InUse, PortTaken, SeveralFaults
from pd_deploy.hosts.concurrent import task_group, together
from pd_deploy.hosts.container_values import ListedContainer, Mount
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.lease import Owner
from pd_deploy.planning import flaws, peers
from pd_deploy.planning.flaws import Flaw, HostAnswers
from pd_deploy.records import generations
from pd_deploy.steps import adopting, images, inspecting
from pd_deploy.steps.host_faults import Holder, holders
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import LockedSession

log = logging.getLogger(__name__)

MIB = 1 << 20
# Plan, scripts, ranktables and record of a generation take some 100 KiB.
STATE_BYTES = MIB


@dataclass(frozen=True)
class Checked(Report):
    """A host that was checked, with what it said; None where that does not matter."""

    answers: HostAnswers | None = None


async def preflight(rollout: Rollout, name: str) -> Checked:
    """Check paths, disk, devices and ports of a host, and report all faults in one error.

    Raises:
        FileMissing, DiskFull, InUse, PortTaken: the only fault found.
        HostError: several faults.
    """
    host, session = rollout.session.host(name), rollout.session
    inspecting_it = [] if rollout.is_last_resort else [inspecting.inspect(session, name)]
    ports, _ = _labelled(rollout, name, generations.PORTS)
    async with task_group() as group:
        answering = [group.create_task(work) for work in inspecting_it]
        checking = group.create_task(faults_of(rollout, name))
        ephemeral = group.create_task(host.facts.ports_in_ephemeral_range(sorted(ports)))
    faults, answers = checking.result(), answering[0].result() if answering else None
    warnings = list[Flaw]()
    if answers:
        of_devices, warnings = _told(rollout, _of_host(rollout, answers))
        faults += of_devices
    if len(faults) == 1:
        raise faults[0]
    if faults:
        hints = dict.fromkeys(fault.hint for fault in faults if fault.hint)
        raise HostError(
            "; ".join(fault.message for fault in faults),
            host=host.where,
            hint="; ".join(hints) or None,
        )
    state = rollout.states[name]
    detail = f"{state.architecture}, Docker {state.docker_version}, {state.interface}"
    if risky := ephemeral.result():
        detail += f"; {_risky(risky)}"
        log.warning("host %s: %s", host.where, _risky(risky))
    for warning in warnings:
        detail += f"; {warning.message}"
    return Checked("preflight", name, name, False, detail, answers=answers)


async def faults_of(rollout: Rollout, name: str) -> list[HostError]:
    """Find what a host lacks of what its part of the plan needs, or what others have of it."""
    host, checks = rollout.session.host(name), [_paths]
    # When nothing serves, `until_free` waits for devices and ports as long as it may, and there is
    # nothing that a disk with little room left would put at risk.
    if not rollout.is_last_resort:
        checks += [_model, _disk, _held, _way_back]
    by_check = await together(check(rollout, host, name) for check in checks)
    faults = [fault for of_check in by_check for fault in of_check]
    return faults + [*_of_other_deployments(rollout, host, name)] * (not rollout.is_last_resort)


async def compare(rollout: Rollout, checked: Sequence[Report]) -> Report:
    """Compare what hosts said; where nothing listens yet, let them call each other's ports.

    Raises:
        HostError, SeveralFaults: hosts that differ where they must not, or don't reach each other.
    """
    answers = [c.answers for c in checked if isinstance(c, Checked) and c.answers]
    found = flaws.across(answers)
    if answers:
        found += await inspecting.try_ways(rollout.session, unused_ports(rollout))
    faults, warnings = _told(rollout, found)
    if faults:
        raise faults[0] if len(faults) == 1 else SeveralFaults(faults)
    detail = "; ".join(f"{w.host}: {w.message}" for w in warnings)
    hosts = f"{len(answers)} hosts agree" if answers else "not compared"
    return Report("compare hosts", "all", "", False, detail or hosts)


def unused_ports(rollout: Rollout) -> dict[str, list[int]]:
    """List the ports by host that its servers and proxies are going to have, and that nobody
    listens at now; the others have proved that they are reached."""
    topology, states = rollout.session.topology, rollout.states
    return {
        name: [p for p in peers.ports(topology, name) if p not in states[name].listening]
        for name in rollout.plan.hosts
    }


def _of_host(rollout: Rollout, answers: HostAnswers) -> list[Flaw]:
    needed = {d for instance in rollout.to_start(answers.name) for d in instance.devices}
    tools = rollout.session.engine.device_tools(rollout.session.deployment)
    return flaws.of_host(answers, tools, sorted(needed))


def _told(rollout: Rollout, found: Iterable[Flaw]) -> tuple[list[HostError], list[Flaw]]:
    """Log warnings; return errors to raise, and the warnings."""
    told = flaws.allowed(found, rollout.session.deployment.allow)
    warnings = [flaw for flaw in told if not flaw.is_error]
    for flaw in warnings:
        log.warning("host %s: %s → %s", flaw.host, flaw.message, flaw.hint)
    errors = [HostError(f.message, host=f.host, hint=f.hint) for f in told if f.is_error]
    return errors, warnings


def _risky(ports: list[int]) -> str:
    return (
        f"ports {', '.join(map(str, ports))} lie in the kernel's ephemeral range, so an outbound "
        "connection may be using one of them when its server starts: reserve them "
        "(sysctl net.ipv4.ip_local_reserved_ports), or move them in the file"
    )


async def until_free(rollout: Rollout, name: str) -> Report:
    """Wait until the devices and ports that stopped containers had are really free.

    What a process of somebody else has taken meanwhile is not waited for, as long as there is a
    generation to go back to.

    Raises:
        InUse: they are not within `gates.free`; says who holds them.
    """
    host, limit = rollout.session.host(name), rollout.session.deployment.gates.free
    begin = time.monotonic()
    taken_since: float | None = None
    while busy := await _busy(rollout, host, name):
        now = time.monotonic()
        strangers = [holder for holder in busy if holder.is_stranger]
        taken_since = (taken_since or now) if strangers else None
        if now - begin >= limit:
            raise _not_free(rollout, host, busy, f"within {limit:g} s", "or raise gates.free")
        if taken_since and now - taken_since >= STRANGER_S and not rollout.is_last_resort:
            raise _not_free(rollout, host, strangers, "", "then run again")
        await asyncio.sleep(POLL_S)
    return Report("free", name, name, False, "devices and ports are free")


POLL_S = 0.25
STRANGER_S = 3.0
"""How long somebody else's process may hold a device or port: it may be a look of a moment."""


async def _busy(rollout: Rollout, host: Host, name: str) -> list[Holder]:
    """List who still has something that the servers about to start need."""
    starting = rollout.to_start(name)
    devices = {device for instance in starting for device in instance.devices}
    ports = {port for instance in starting for port in instance.ports}
    return await holders(rollout, host, devices, ports)


def _not_free(rollout: Rollout, host: Host, busy: Iterable[Holder], limit: str, hint: str) -> InUse:
    when = "after the old generation stopped" if rollout.attempt.stopped else ""
    words = ["expected devices and ports to be free", limit, when]
    return InUse(
        f"{' '.join(filter(None, words))}, found {', '.join(map(str, busy))}",
        host=host.where,
        hint=f"stop what uses them, {hint}",
    )


async def _way_back(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    """Find what an adopted service that serves would lack to come back, should this fail."""
    if not rollout.history.record.adopted_serving:
        return []
    missing = await together(
        adopting.missing_of(rollout.session, container)
        for _, container in rollout.leaving
        if container.host == host.address
    )
    return [fault for fault in missing if fault]


async def _paths(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    plan = rollout.plan.hosts.get(name)
    if plan is None:
        return []
    # Containers mount the parents: all instances' directories of a generation, and of its logs.
    ours = {*plan.directories, *(str(PurePosixPath(path).parent) for path in plan.directories)}
    specs = [instance.container for instance in plan.instances.values()]
    ours |= {mount.source for mount in rollout.code_on(name).values()}
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


async def _model(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    """Find what the servers about to start would miss of the model: links that lead out of what
    their containers mount, and files that can't be read."""
    path = rollout.session.deployment.model.path
    servers = [i for i in rollout.to_start(name) if i.role != "proxy"]
    if not servers:
        return []
    mounts = [mount for server in servers for mount in server.container.mounts]
    model_links = await host.facts.links(path, sorted({mount.source for mount in mounts}))
    lost = {
        k: to
        for k, to in model_links.links.items()
        if not _is_visible(k, to, mounts, model_links.paths)
    }
    faults: list[HostError] = []
    if lost:
        link, to = next(iter(sorted(lost.items())))
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        faults.append(
            FileMissing(
                f"expected links in the model's directory to lead where containers can look, "
                f"found {link} → {to or 'nothing'}{more}",
                path=link,
                host=host.where,
                hint=f"mount {posixpath.dirname(to) or 'it'} at the same path (`settings: {{all: "
                "{mounts: …}}`), or use a copy without links",
            )
        )
    if model_links.closed:
        closed = ", ".join(model_links.closed[:5])
        message = f"expected files and directories that root can read, found {closed}"
        hint = "check their owner and the file system's root_squash option"
        faults.append(FileDenied(message, host=host.where, hint=hint))
    return faults


def _is_visible(link: str, to: str, mounts: Iterable[Mount], sources: Mapping[str, str]) -> bool:
    """Tell whether a container sees where a link leads.

    Args:
        sources: where the mounts' sources lead; Docker follows links in them.
    """
    return any(
        (mount.source == mount.target and _is_in(to, mount.source))
        # Links within a mount are relative, as a rule.
        or (_is_in(link, mount.source) and _is_in(to, sources.get(mount.source, mount.source)))
        for mount in mounts
    )


def _is_in(path: str, directory: str) -> bool:
    return PurePosixPath(path).is_relative_to(directory) if path else False


async def _disk(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    """Find out where the host lacks room for what is going to be written.

    A generation that has served has all its files: a full disk must not keep it from coming back.
    """
    deployment, state = rollout.session.deployment, rollout.states[name]
    if name not in rollout.plan.hosts:
        return []
    needed: list[images.Room] = []
    if rollout.plan.generation not in rollout.history.good:
        needed += [
            ("its state", deployment.paths.state, STATE_BYTES),
            ("logs", deployment.paths.logs, deployment.disk.logs),
        ]
    if await host.docker.image(rollout.plan.pinned_image) is None:
        needed.append(await images.room(deployment, state, rollout.release.chosen_image))
    return await images.lacking(host, needed)


async def _held(rollout: Rollout, host: Host, name: str) -> list[HostError]:
    """Find devices and ports in use by anything but this deployment's running containers."""
    devices, our_devices = _labelled(rollout, name, generations.DEVICES)
    ports, our_ports = _labelled(rollout, name, generations.PORTS)
    unused, unbound = devices.keys() - our_devices, ports.keys() - our_ports
    faults: list[HostError] = []
    for holder in await holders(rollout, host, unused, unbound):
        # Of a stopping generation's devices its labels tell; so this is an adopted service's.
        if holder.kind == "device" and not holder.is_ours:
            faults.append(
                InUse(
                    f"expected {holder.what} to be free for {devices[holder.number]}, "
                    f"found {holder.who} on it",
                    host=host.where,
                    hint=f"stop that process, or use other devices{_adopt(holder)}",
                )
            )
        # An older generation's proxy may have a port that its labels do not name.
        elif holder.kind == "port" and not holder.is_ours:
            faults.append(
                PortTaken(
                    f"expected {holder.what} to be free for {ports[holder.number]}, "
                    f"found that {holder.who} has it",
                    host=host.where,
                    hint="stop that process, or change the port in the deployment file"
                    f"{_adopt(holder)}",
                )
            )
    return faults


def _adopt(holder: Holder) -> str:
    """Name the way to take over a service that was started by other means."""
    if not holder.container:
        return ""
    return (
        "; if that container is of the service which this one replaces: `pd-deploy adopt FILE` "
        "takes it over"
    )


def _labelled(rollout: Rollout, name: str, label: str) -> tuple[dict[int, str], set[int]]:
    """Return the ports or devices of a host that the plan wants, each with the instance that does,
    and those that the deployment's running containers have."""
    plan = rollout.plan.hosts.get(name)
    needed = {
        number: instance_name
        for instance_name, instance in (plan.instances.items() if plan else ())
        for number in generations.numbers(instance.container.labels[label])
    }
    running = [c for c in rollout.states[name].containers if c.status in generations.RUNNING]
    return needed, {n for c in running for n in generations.numbers(c.labels.get(label, ""))}


def _of_other_deployments(rollout: Rollout, host: Host, name: str) -> Iterator[HostError]:
    """Find devices and ports that another deployment's containers have, or its run claims."""
    claims = [(_holder(state), _uses(state)) for state in rollout.states[name].others]
    leases = rollout.session.lease.others if isinstance(rollout.session, LockedSession) else {}
    for other in leases.get(host.address, []):
        if other.age < rollout.session.deployment.gates.lease_lasts:
            run = f"{other.owner.run} of deployment {other.owner.deployment}"
            claims.append((f"{run}, which is at work,", _claimed(other.owner)))
    for label in (generations.DEVICES, generations.PORTS):
        needed, _ = _labelled(rollout, name, label)
        for holder, used in claims:
            shared = sorted(needed.keys() & used[label])
            if shared:
                yield InUse(
                    f"expected the {label.rpartition('.')[2]} {', '.join(map(str, shared))} to be "
                    f"this deployment's, found that {holder} uses them",
                    host=host.where,
                    hint="tear that deployment down, or change devices or ports in the file",
                )


def _holder(state: ListedContainer) -> str:
    return f"{state.name} of deployment {state.labels[generations.DEPLOYMENT]}"


def _uses(state: ListedContainer) -> dict[str, set[int]]:
    return {
        label: generations.numbers(state.labels.get(label, ""))
        for label in (generations.DEVICES, generations.PORTS)
    }


def _claimed(owner: Owner) -> dict[str, set[int]]:
    return {generations.DEVICES: set(owner.devices), generations.PORTS: set(owner.ports)}
