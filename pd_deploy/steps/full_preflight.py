"""All checks of hosts, also those that take long. Changes nothing; a host may be away.

What is wrong is returned, not raised: so all of it is told together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pd_deploy.config.fields import archive_of
from pd_deploy.errors import (
    ConnectionDropped,
    HostUnreachable,
    PdDeployError,
    TimedOut,
    WrongArchitecture,
    faults_of,
)
from pd_deploy.hosts import lease
from pd_deploy.hosts.concurrent import together
from pd_deploy.planning import flaws, peers
from pd_deploy.planning.flaws import Flaw, HostAnswers
from pd_deploy.registry import archives
from pd_deploy.steps import host_records, inspecting, preflight
from pd_deploy.steps.asking import answer_of
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import Session


@dataclass(frozen=True)
class Inspected:
    """A host that was asked; `answers` is None if it did not answer, `flaws` say why."""

    host: str
    answers: HostAnswers | None
    flaws: tuple[Flaw, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What a preflight found: what is wrong, errors first, and what hosts that answered said."""

    flaws: Sequence[Flaw]
    answers: Sequence[HostAnswers] = ()


async def inspect_host(session: Session, name: str) -> Inspected:
    """Ask a host what it is like, and judge it alone.

    Its tools may take long, so whether it answers at all is tried before.
    """
    host = session.host(name)
    quick = together((host_records.read(host, session.root), host.docker.listed()))
    fault = await answer_of(host, quick)
    if isinstance(fault, TimedOut | HostUnreachable | ConnectionDropped):
        return Inspected(name, None, (flaw_of(fault, host.where),))
    try:
        answers = await inspecting.inspect(session, name, full=True)
    except PdDeployError as error:
        return Inspected(name, None, (flaw_of(error, host.where),))
    tools, devices = session.engine.device_tools(session.deployment), answers.devices
    needed = sorted(devices.devices) if devices else []
    return Inspected(name, answers, tuple(flaws.of_host(answers, tools, needed)))


async def compare_all(
    session: Session,
    inspected: Sequence[Inspected],
    full_hashes: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Flaw]:
    """Compare what hosts said, and the contents of the model's files.

    Args:
        full_hashes: whether to read the files whole.
        on_progress: told how far that is.
    """
    answers = _answers(inspected)
    try:
        answers = await inspecting.compare_parts(session, answers, full_hashes, on_progress)
    except PdDeployError as error:
        return [flaw_of(error), *flaws.across(answers), *flaws.gateways(answers)]
    return [*flaws.across(answers), *flaws.gateways(answers)]


async def try_ports(session: Session, inspected: Sequence[Inspected]) -> list[Flaw]:
    """Let hosts call each other's ports, at which they listen for a moment; not while a run is at
    work, whose servers may be about to bind them."""
    answers = _answers(inspected)
    ports = {
        a.name: [p for p in peers.ports(session.topology, a.name) if p not in a.listening]
        for a in answers
    }
    try:
        if not any(ports.values()):
            return []
        looks = await together(
            session.host(a.name).output(lease.look_command(session.root)) for a in answers
        )
        holdings = {str(holding) for look in looks if (holding := lease.parse_look(look))}
        if holdings:
            return [
                Flaw(
                    "ports-reachable", "",
                    f"expected to try ports, found that a run is at work: {'; '.join(holdings)}",
                    "run this again when it has ended", is_error=False,
                )
            ]  # fmt: skip
        return await inspecting.try_ways(session, ports)
    except PdDeployError as error:
        return [flaw_of(error)]


async def ping_devices(session: Session, inspected: Sequence[Inspected]) -> list[Flaw]:
    """Let devices call those of other hosts."""
    try:
        return await inspecting.ping_devices(session, _answers(inspected))
    except PdDeployError as error:
        return [flaw_of(error)]


async def check_plan(rollout: Rollout) -> list[Flaw]:
    """Check what the hosts lack of what a run would need now, and what the image is for."""
    try:
        faults = await together(preflight.faults_of(rollout, name) for name in rollout.plan.hosts)
        return [flaw_of(fault) for of in faults for fault in of] + await _architecture(rollout)
    except PdDeployError as error:
        return [flaw_of(fault) for fault in faults_of(error) if isinstance(fault, PdDeployError)]


def flaw_of(error: PdDeployError, where: str = "") -> Flaw:
    """Make a flaw of an error."""
    check = "image-architecture" if isinstance(error, WrongArchitecture) else "host"
    return Flaw(check, error.host or where, error.message, error.hint or "")


def _answers(inspected: Sequence[Inspected]) -> list[HostAnswers]:
    return [one.answers for one in inspected if one.answers]


async def _architecture(rollout: Rollout) -> list[Flaw]:
    """Find hosts that the image is not for, before anybody pulls it."""
    session, pinned = rollout.session, rollout.plan.pinned_image
    archive = archive_of(rollout.release.chosen_image)
    if archive:
        known = frozenset({(await archives.read(archive)).architecture} - {""})
    elif session.deployment.pull == "never":
        image = await session.host(session.topology.home).docker.image(pinned)
        known = frozenset({image.architecture} - {""}) if image else frozenset[str]()
    else:
        docker = session.host(session.topology.home).docker
        known = await docker.architectures(pinned, session.registry_login)
    return [
        Flaw(
            "image-architecture", session.host(name).where,
            f"expected an image for {state.architecture}, the host's architecture; "
            f"found {pinned} for {', '.join(sorted(known))}",
            "name a tag that was built for it, or push an image for both architectures",
        )
        for name, state in rollout.states.items()
        if known and state.architecture not in known and name in rollout.plan.hosts
    ]  # fmt: skip
