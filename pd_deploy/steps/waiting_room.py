"""The waiting room: a container that holds clients' requests while a run has nothing that serves.

It is made while the old generation serves, takes the proxy's port when the old proxy lets go of it,
and leaves it to the new proxy, to which it forwards what it has held. Each proxy has its own.
Nothing of it can fail a run: without it, connections are refused meanwhile, as without
`proxy.hold`.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources

from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Proxy
from pd_deploy.errors import PdDeployError
from pd_deploy.hosts.container_values import ContainerSpec, ContainerState
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import LockedSession, Session
from pd_deploy.steps.waiting_room_program import CLOSED, READY, TAKING

log = logging.getLogger(__name__)

_SOURCE = resources.files(__package__).joinpath("waiting_room_program.py").read_text()
# ~/.bashrc says which Python an image has.
_PYTHON = 'source ~/.bashrc >/dev/null 2>&1; exec "$(command -v python3 || command -v python)" "$@"'
READY_S = 60.0  # a container's first start on a busy disk; the old generation serves meanwhile
CALL_S = 10.0  # what it is told during a cut-over
LEAVES_S = 3.0
TAKES_S = 1.0  # of a host that has other things to do; the old proxy serves meanwhile


@dataclass(frozen=True)
class Held:
    """What became of requests that came while nothing served.

    Attributes:
        held: how many waited, for up to `longest` seconds.
        refused: those, and others, that were told to try again.
        left: those whose clients went away.
    """

    held: int
    refused: int
    left: int
    longest: float

    def __str__(self) -> str:
        if not self.held and not self.refused:
            return ""
        told = [f"held {_requests(self.held)} for up to {self.longest:.1f} s"] if self.held else []
        told += [f"told {_requests(self.refused)} to try again (503)"] if self.refused else []
        told += [f"{_requests(self.left)} gone before that"] if self.left else []
        return ", ".join(told)


def is_wanted(rollout: Rollout, proxy: Proxy) -> bool:
    """Tell whether a proxy's requests are to be held, or are already, by what another run has left:
    not where it stays, and has its port."""
    holds = proxy.entry.hold > 0 and proxy.name not in rollout.staying
    return holds or rollout.has_waiting_room(proxy)


async def prepare(rollout: Rollout, instance: str) -> Report:
    """Make a proxy's waiting room ready, or take over the one that another run has left.

    Where requests can't be held, the detail says why.
    """
    where = rollout.session.topology.host_of(instance)
    try:
        async with asyncio.timeout(READY_S):
            changed, detail = await _prepare(rollout, instance)
    except Exception as fault:
        changed, detail = False, f"requests will not be held: {_why(fault)}"
        log.warning("host %s: %s", rollout.session.host(where).where, detail)
    return Report("prepare waiting room", instance, where, changed, detail)


async def take_port(rollout: Rollout, proxy: str) -> None:
    """Have a proxy's room take the port as soon as the old proxy, which is about to be stopped,
    lets go of it: at once where the proxy's program shares its port. Return when it has, or tries
    to."""
    if proxy in rollout.attempt.waiting_rooms:
        async with _harmless():
            await _signal(rollout, proxy, "SIGUSR1")
            room = rollout.attempt.waiting_rooms[proxy]
            await rollout.session.host_of(proxy).docker.wait_log(room, TAKING, TAKES_S)


async def make_way(rollout: Rollout, proxy: str) -> None:
    """Have a proxy's room leave the port to the new proxy, which is about to open: once the two
    share it, or now where the proxy can't share it."""
    session = rollout.session
    script = rollout.plan.instance(proxy).start_script.content
    if proxy in rollout.attempt.waiting_rooms:
        shares_port = session.engine.shares_port(session.topology.proxy(proxy), script)
        async with _harmless():
            await _signal(rollout, proxy, "SIGUSR2" if shares_port else "SIGHUP")
        if not shares_port:
            async with _harmless():
                await _left(rollout, proxy)


async def see_off(rollout: Rollout, proxy: str) -> None:
    """See that a proxy's room has left the port to it, as it is open; note what was held."""
    if proxy in rollout.attempt.waiting_rooms:
        async with _harmless():
            await _left(rollout, proxy)
        async with _harmless():
            await _note(rollout, proxy)


async def dismiss(rollout: Rollout) -> None:
    """End, after a failure, every room that holds requests for a proxy that does not come."""
    session = rollout.locked
    for proxy in session.topology.proxies:
        if is_wanted(rollout, proxy):
            async with _harmless():
                await _end_all(session, proxy)


async def outdated(host: Host, containers: Iterable[ContainerState]) -> list[ContainerState]:
    """List the rooms on a host that nobody needs at the end of a run: those that have ended, or
    still wait for a proxy. One that has left its port ends when its last answer does."""
    rooms = [c for c in containers if c.labels.get(generations.ROLE) == generations.WAITING_ROOM]
    return [r for r in rooms if r.status not in generations.RUNNING or await _waits(host, r)]


async def _prepare(rollout: Rollout, instance: str) -> tuple[bool, str]:
    session, host = rollout.locked, rollout.session.host_of(instance)
    proxy = session.topology.proxy(instance)
    if rollout.plan.instance(instance) not in rollout.to_start(proxy.host):
        await _end_all(session, proxy)
        return False, f"requests are not held: {instance} runs and stays"
    for room in await _rooms(session, proxy):
        if room.status in generations.RUNNING and await _waits(host, room):
            rollout.attempt.waiting_rooms[instance] = room.id
            return False, f"{room.name} holds requests already"
    if reason := _in_vain(rollout, proxy):
        return False, f"requests are not held: {reason}"
    spec = _spec(rollout, proxy)
    await session.may_change(host)
    room_id = await host.docker.create(spec)
    await session.may_change(host)
    await host.docker.start(room_id)
    if await host.docker.wait_log(room_id, READY, READY_S) != "seen":
        lines = await host.docker.logs(room_id, 5)
        raise PdDeployError(
            f"{spec.name} did not start: {lines.strip()[-500:] or 'it says nothing'}"
        )
    rollout.attempt.waiting_rooms[instance] = room_id
    return True, f"started {spec.name}; its port is closed"


def _in_vain(rollout: Rollout, proxy: Proxy) -> str:
    """Say why there is nothing to hold a proxy's requests for; "" if there is."""
    if not proxy.entry.hold:
        return "`proxy.hold` is 0"
    closing = {
        (host, int(state.labels.get(generations.PORTS, "0").partition(",")[0]))
        for host, state in rollout.stopping
        if state.labels[generations.ROLE] == "proxy"
    }
    if not closing and not rollout.attempt.was_down:
        return "no proxy of this deployment is stopped"
    if closing and (proxy.host, proxy.port) not in closing:
        was = ", ".join(f"{host}:{number}" for host, number in sorted(closing))
        return f"{proxy.name} moves from {was} to {proxy.host}:{proxy.port}"
    return ""


def _spec(rollout: Rollout, proxy: Proxy) -> ContainerSpec:
    """Specify the container of a proxy's room: it needs Python and the host's network."""
    session = rollout.session
    options = {
        "port": proxy.port,
        "proxy": proxy.address,
        "hold": proxy.entry.hold,
        "lasts": _longest_run(session.deployment),
    }
    deployment = session.deployment.name
    return ContainerSpec(
        name=f"pd-deploy-waiting-room_{deployment}_{secrets.token_hex(4)}",
        image=rollout.plan.pinned_image,
        entrypoint=(),
        command=("bash", "-c", _PYTHON, "bash", "-I", "-c", _SOURCE, json.dumps(options)),
        network_mode="host",
        user="root",
        init=False,
        labels={
            generations.DEPLOYMENT: deployment,
            generations.ROLE: generations.WAITING_ROOM,
            generations.PROXY: proxy.name,
        },
    )


def _longest_run(deployment: Deployment) -> float:
    """How long it takes from the room's start to the end of a run that fails and goes back."""
    gates = deployment.gates
    waits = (gates.free, gates.prepare_proxy, 3 * gates.start, gates.ready, gates.smoke)
    return gates.away + 2 * (2 * deployment.drain + sum(waits))


async def _rooms(session: Session, proxy: Proxy) -> list[ContainerState]:
    label = {
        generations.DEPLOYMENT: session.deployment.name,
        generations.ROLE: generations.WAITING_ROOM,
    }
    containers = await session.host(proxy.host).docker.containers(label)
    return generations.waiting_rooms(containers, proxy.name)


async def _waits(host: Host, room: ContainerState) -> bool:
    """Tell whether a room still has its port, or is to take it."""
    return CLOSED not in await host.docker.logs(room.id, "all")


async def _signal(rollout: Rollout, proxy: str, name: str) -> None:
    session, host = rollout.locked, rollout.session.host_of(proxy)
    room = rollout.attempt.waiting_rooms[proxy]
    await session.may_change(host)
    await host.docker.kill(room, name, deployment=session.deployment.name)


async def _left(rollout: Rollout, proxy: str) -> None:
    """See that a proxy's room has left its port; one that does not is killed."""
    room, port = rollout.attempt.waiting_rooms[proxy], rollout.session.topology.proxy(proxy).port
    docker = rollout.session.host_of(proxy).docker
    if await docker.wait_log(room, CLOSED, LEAVES_S) == "timeout":
        log.warning("the waiting room of %s did not leave port %s, so it is killed", proxy, port)
        await _signal(rollout, proxy, "SIGKILL")


async def _note(rollout: Rollout, proxy: str) -> None:
    host = rollout.session.host_of(proxy)
    output = await host.docker.logs(rollout.attempt.waiting_rooms[proxy], "all")
    if line := output.partition(CLOSED)[2].partition("\n")[0]:
        told = str(Held(**json.loads(line)))
        several = len(rollout.session.topology.proxies) > 1
        rollout.attempt.held[proxy] = f"{proxy} {told}" if several and told else told


async def _end_all(session: LockedSession, proxy: Proxy) -> None:
    host = session.host(proxy.host)
    for room in await _rooms(session, proxy):
        if room.status in generations.RUNNING and await _waits(host, room):
            await session.may_change(host)
            await host.docker.kill(room.id, "SIGTERM", deployment=session.deployment.name)
            await host.docker.wait_log(room.id, CLOSED, LEAVES_S)


@asynccontextmanager
async def _harmless() -> AsyncIterator[None]:
    """Do something with a room that no run waits long for, or fails by. What else is wrong, such as
    a lease that was lost, the run's own steps find."""
    try:
        async with asyncio.timeout(CALL_S):
            yield
    except Exception as fault:
        log.warning("requests may be refused instead of held: %s", _why(fault))


def _why(fault: BaseException) -> str:
    return str(fault).partition("\n")[0] or "no answer in time"


def _requests(count: int) -> str:
    return f"{count} request" if count == 1 else f"{count} requests"
