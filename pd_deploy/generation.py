"""Generations: what is deployed now, what should be, and what must stop in between. Pure.

A generation is one coherent set: an image, all containers, scripts and ranktables. Its name is
`<epoch>-<fingerprint>`: the epoch counts up, the fingerprint is of everything that would run.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pd_deploy.hosts import DEPLOYMENT_LABEL, ContainerState

DEPLOYMENT = DEPLOYMENT_LABEL
GENERATION = "pd-deploy.generation"
EPOCH = "pd-deploy.epoch"
INSTANCE = "pd-deploy.instance"
ROLE = "pd-deploy.role"
PORTS = "pd-deploy.ports"
DEVICES = "pd-deploy.devices"
IMAGE = "pd-deploy.image"

Containers = Mapping[str, Iterable[ContainerState]]
"""Host name → the deployment's containers on it."""

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
        """The generation of that name, or None when it is not one."""
        match = re.fullmatch(r"([1-9]\d{0,8})-([0-9a-f]{8})", name, re.ASCII)
        return cls(int(match[1]), match[2]) if match else None


def fingerprint(rendered: str) -> str:
    """Eight hexadecimal digits that stand for all that would run."""
    return hashlib.sha256(rendered.encode()).hexdigest()[:8]


def latest(names: Iterable[str]) -> Generation | None:
    """The youngest generation among the names found on the hosts."""
    return max(filter(None, map(Generation.parse, names)), default=None)


def desired(names: Iterable[str], wanted: str) -> Generation:
    """The youngest generation if it is what is wanted, else the next one."""
    last = latest(names)
    if last and last.fingerprint == wanted:
        return last
    return Generation(last.epoch + 1 if last else 1, wanted)


def to_stop(
    generation: Generation,
    instances: Iterable[str],
    containers: Containers,
) -> list[tuple[str, ContainerState]]:
    """Running containers (with their host) that must stop before the generation can start.

    These are all of other generations; and of this one, when a member has ended or is gone, every
    other member, because links between prefill and decode are made once, while loading. The proxy
    stops whenever a server does not run.
    """
    ours: list[tuple[str, ContainerState]] = []
    others: list[tuple[str, ContainerState]] = []
    for host, states in containers.items():
        for state in states:
            mine = state.labels.get(GENERATION) == str(generation)
            (ours if mine else others).append((host, state))
    members = set(instances)
    servers = [(h, s) for h, s in ours if s.labels[INSTANCE] in members]
    gone = members - {state.labels[INSTANCE] for _, state in servers}
    ended = gone or any(state.status in ENDED for _, state in servers)
    complete = sum(state.status in RUNNING for _, state in servers) == len(members)
    stopping = others
    if ended:
        stopping = others + ours
    elif not complete:
        stopping = others + [place for place in ours if place not in servers]
    return [(host, state) for host, state in stopping if state.status in RUNNING]
