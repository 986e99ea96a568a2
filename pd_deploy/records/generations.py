"""Generations: what is deployed now, what should be, and what must stop in between. Pure.

A generation is one coherent set: an image, all containers, scripts and ranktables. Its name is
`<epoch>-<fingerprint>`: the epoch counts up, the fingerprint is of everything that would run.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from pd_deploy.hosts.container_values import DEPLOYMENT_LABEL, ContainerState, ListedContainer

DEPLOYMENT = DEPLOYMENT_LABEL
GENERATION = "pd-deploy.generation"
EPOCH = "pd-deploy.epoch"
INSTANCE = "pd-deploy.instance"
ROLE = "pd-deploy.role"
PORTS = "pd-deploy.ports"
DEVICES = "pd-deploy.devices"
IMAGE = "pd-deploy.image"
PROBE = "probe"
"""Role of a container that only says what its image is; of no generation, gone after seconds."""

WAITING_ROOM = "waiting-room"
"""Role of a container that holds requests while nothing serves; of no generation either."""

PROXY = "pd-deploy.proxy"
"""Label of a waiting room: the proxy whose requests it holds."""

Containers = Mapping[str, Iterable[ContainerState]]
"""Host name → the deployment's containers on it."""

C = TypeVar("C", ContainerState, ListedContainer)

RUNNING = frozenset({"running", "restarting", "paused"})
ENDED = frozenset({"exited", "dead"})


@dataclass(frozen=True, order=True)
class Generation:
    """A generation's name, taken apart; orders by age."""

    epoch: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.epoch}-{self.fingerprint}"

    @classmethod
    def parse(cls, name: str) -> "Generation | None":
        """Parse a generation's name; return None if it is none."""
        match = re.fullmatch(r"([1-9]\d{0,8})-([0-9a-f]{8})", name, re.ASCII)
        return cls(int(match[1]), match[2]) if match else None


def fingerprint(rendered: str) -> str:
    """Hash all that would run to eight hexadecimal digits."""
    return hashlib.sha256(rendered.encode()).hexdigest()[:8]


def latest(names: Iterable[str]) -> Generation | None:
    """Return the youngest generation among the names found on the hosts."""
    return max(filter(None, map(Generation.parse, names)), default=None)


def desired(names: Iterable[str], fingerprint: str, serving: str | None = None) -> Generation:
    """Return the generation with the wanted fingerprint: the one that serves, or else the youngest,
    if it has it; otherwise the next one."""
    youngest = latest(names)
    for generation in (Generation.parse(serving or ""), youngest):
        if generation and generation.fingerprint == fingerprint:
            return generation
    return Generation(youngest.epoch + 1 if youngest else 1, fingerprint)


def to_stop(
    planned: Mapping[str, str],
    containers: Containers,
    restarts_with: Callable[[str], Collection[str]],
    failed: AbstractSet[str] = frozenset(),
) -> list[tuple[str, ContainerState]]:
    """List the running containers, with their host, that must stop before a generation can start.

    These are all that are not of its plan; and of it, when a server has ended, is gone or has
    failed, every one that has to start again with it. The proxy stops whenever a server has not
    been started yet.

    Args:
        planned: name of each of its containers → the role.
        restarts_with: by name of a server's container, those of the plan that can't go on without
            it, or with a new one in its place.
        failed: containers of the plan that run, and don't work.
    """
    ours: list[tuple[str, ContainerState]] = []
    others: list[tuple[str, ContainerState]] = []
    for host, states in containers.items():
        for state in states:
            (ours if state.name in planned else others).append((host, state))
    members = {name for name, role in planned.items() if role != "proxy"}
    servers = [(host, state) for host, state in ours if state.name in members]
    lost = members - {state.name for _, state in servers}
    lost |= {state.name for _, state in servers if state.status in ENDED} | (members & failed)
    complete = sum(state.status in RUNNING for _, state in servers) == len(members)
    stopping = others
    if lost or failed:
        again = set(failed)
        for name in lost if any(state.status in RUNNING for _, state in ours) else ():
            if name not in again or name in failed:
                again.update(restarts_with(name))
        stopping = others + [(host, state) for host, state in ours if state.name in again]
    elif not complete:
        stopping = others + [proxy for proxy in ours if proxy not in servers]
    return [(host, state) for host, state in stopping if state.status in RUNNING]


def waiting_rooms(containers: Iterable[C], proxy: str) -> list[C]:
    """Choose the waiting rooms of a proxy; those that older versions have made name none."""
    return [
        c
        for c in containers
        if c.labels.get(ROLE) == WAITING_ROOM and c.labels.get(PROXY, proxy) == proxy
    ]


def lost_since(states: Iterable[ContainerState]) -> datetime | None:
    """Tell since when the containers of a generation can't serve: since the last of all proxies, of
    all prefills or of all decodes ended. None while they can, or where none has ever run."""
    by_role: dict[str, list[ContainerState]] = {}
    for state in states:
        by_role.setdefault(state.labels.get(ROLE, ""), []).append(state)
    ends = [
        max(state.finished_at for state in members if state.finished_at)
        for members in by_role.values()
        if all(state.status in ENDED and state.finished_at for state in members)
    ]
    return min(ends, default=None)


def numbers(label: str) -> set[int]:
    """Read the numbers in a label such as `9000,8000`."""
    return {int(number) for number in label.split(",") if number}
