"""Machines with their images and containers; the cluster that they make, and its registry."""

import hashlib
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tests.memory import answers
from tests.memory.calls import Way
from tests.memory.clock import Clock
from tests.memory.disk import Disk

if TYPE_CHECKING:
    from tests.memory.programs import Program


OUTSIDE = 17
"""The process that holds what no container does."""


@dataclass(frozen=True)
class Faults:
    """How an instance's engine misbehaves.

    Attributes:
        dies: exit code with which it ends while it loads.
        hangs: never gets ready.
        garbage: answers something that is no completion.
        refuses_kv: prefill hands no KV over.
        ignores_kv: decode computes the prompt itself.
        wrong_kv: decode reads other KV than prefill made, without any error.
        dies_at_request: exit code with which it ends when it is asked.
        out_of_memory: the kernel ends it while it loads.
        token_seconds: how long each token of a stream takes; else it comes at once, in one event.
    """

    dies: int | None = None
    hangs: bool = False
    garbage: bool = False
    refuses_kv: bool = False
    ignores_kv: bool = False
    wrong_kv: bool = False
    dies_at_request: int | None = None
    out_of_memory: bool = False
    token_seconds: float = 0.0


@dataclass(frozen=True)
class Build:
    """An image in the registry: its digest, what is wrong with it, by instance or `*`, the machines
    that it is for, and what it prints when it is asked what it is; None if it never answers. One
    without Python can't hold requests. `load_generator` is the version of the engine's own; empty
    if it has none."""

    digest: str
    faults: Mapping[str, Faults] = field(default_factory=dict)
    architecture: str = "arm64"
    answer: str | None = answers.of("by its tag")
    has_python: bool = True
    load_generator: str = "0.9.0"


@dataclass
class LocalImage:
    """An image on a machine, with its names by tag and by digest."""

    id: str
    build: Build
    tags: set[str] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)


@dataclass
class Container:
    """A container: what it was made of and what became of it. `config` is the API's own body."""

    id: str
    name: str
    config: dict[str, Any]
    image: LocalImage
    status: str = "created"
    exit_code: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    oom_killed: bool = False
    error: str = ""
    runs: int = 0
    log: list[tuple[datetime, str]] = field(default_factory=list)
    program: "Program | None" = None

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return dict(self.config.get("Labels", {}))

    @property
    def running(self) -> bool:
        """Whether its program runs."""
        return self.status == "running"

    @property
    def pid(self) -> int:
        """Of its main process."""
        return 4000 + zlib.crc32(self.id.encode())

    @property
    def run_id(self) -> str:
        """The present run of it: another one after each start."""
        return f"{self.id}/{self.runs}"


class Machine:
    """One machine of a cluster.

    Attributes:
        held_devices, held_ports: what processes outside of any container have, by name.
        answers_after: seconds that each command takes.
        pulls_for: seconds that a pull takes, or a load.
        lingers_for: seconds for which connections of a program that has ended are in TIME_WAIT.
        silence: seconds after which a connection without an answer counts as lost.
        unplugged_until: when its cable is plugged in again, by the clock's seconds.
        health: what npu-smi says of devices that are not OK.
        links: where links in the model's directory lead.
        closed: files in it that root may not read.
        ports_down: devices whose network ports are down.
        driver: the version that npu-smi prints.
        hccn: what hccn_tool prints, by device and what it is asked, where that is not the usual.
        files: what files of the system hold, over what is usual.
        clock_ahead: seconds that its clock is ahead of the others'.
        mtu: of its interface.
        closed_to: addresses that get no answer from its ports.
        captured: what commands printed on a host that it stands for, by command.
        route_address: its own on the default route; "" without such a route.
        docker_since: when its Docker started, by the clock's seconds.
        hanging: the ways whose calls it never answers: its Docker engine hangs, or its disk.
        security_options: what the engine says of its security.
    """

    def __init__(self, name: str, address: str, cluster: "Cluster") -> None:
        self.name = name
        self.address = self.route_address = address
        self.cluster = cluster
        self.disk = Disk()
        self.images: dict[str, LocalImage] = {}
        self.containers: dict[str, Container] = {}
        self.held_devices: dict[int, str] = {}
        self.held_ports: dict[int, str] = {}
        self.answers_after = 0.0
        self.pulls_for = 0.0
        self.lingers_for = 0.0
        self.lingering: dict[int, float] = {}
        self.silence = 15.0
        self.unplugged_until = 0.0
        self.hanging: Collection[Way] = ()
        self.health: dict[int, str] = {}
        self.ports_down: set[int] = set()
        self.driver = "24.1.rc3.5"
        self.hccn: dict[tuple[int, str], str] = {}
        self.files: dict[str, str] = {}
        self.clock_ahead = 0.0
        self.mtu = 1500
        self.closed_to: set[str] = set()
        self.captured: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.closed: list[str] = []
        self.docker_since = 0.0
        self.security_options = ["name=seccomp,profile=builtin"]

    @property
    def clock(self) -> Clock:
        """The cluster's clock."""
        return self.cluster.clock

    def running(self) -> Iterator[Container]:
        """The containers that run."""
        return (one for one in self.containers.values() if one.running)

    def find_image(self, ref: str) -> LocalImage | None:
        """The image with a tag, a digest or an id."""
        for image in self.images.values():
            if ref in image.tags or ref in image.digests or ref == image.id:
                return image
        return None

    def pull(self, ref: str, build: Build) -> None:
        """Brings an image from the registry."""
        repository = ref.partition("@")[0]
        if "@" not in ref:
            repository = ref.rpartition(":")[0]
        image_id = f"sha256:{hashlib.sha256(build.digest.encode()).hexdigest()}"
        image = self.images.setdefault(image_id, LocalImage(image_id, build))
        image.digests.add(f"{repository}@{build.digest}")
        if "@" not in ref:
            image.tags.add(ref)

    def say(self, container: Container, line: str) -> None:
        """A line in a container's log."""
        container.log.append((self.clock.date(), f"{line}\n"))

    def end(self, container: Container, exit_code: int, *, oom_killed: bool = False) -> None:
        """A container's program ends."""
        container.status = "exited"
        container.oom_killed = oom_killed
        container.exit_code = exit_code
        container.finished_at = self.clock.date()
        if container.program and self.lingers_for:
            until = self.clock.seconds() + self.lingers_for
            self.lingering |= {port: until for _, port in container.program.bound()}
        container.program = None

    def lingers(self, port: int) -> bool:
        """Whether connections of a server that ended are in TIME_WAIT on a port."""
        return self.clock.seconds() < self.lingering.get(port, 0.0)

    def reboot(self) -> None:
        """Power goes and comes, or Docker starts again: nothing runs."""
        for container in list(self.running()):
            self.end(container, 137)
        self.docker_since = self.clock.seconds()

    def unplug(self, seconds: float = math.inf) -> None:
        """Takes its network away for so long; what runs there goes on."""
        self.unplugged_until = self.clock.seconds() + seconds

    def plug_in(self) -> None:
        """Gives it back."""
        self.unplugged_until = 0.0

    @property
    def unplugged(self) -> bool:
        """Whether nobody reaches it now."""
        return self.clock.seconds() < self.unplugged_until

    def device_users(self) -> dict[int, tuple[str, int]]:
        """By device, who uses it, with the process's id."""
        users = {number: (name, OUTSIDE) for number, name in self.held_devices.items()}
        for one in self.running():
            if one.program:
                users |= dict.fromkeys(one.program.devices, ("python3.1", one.pid))
        return users

    def listeners(self) -> list[tuple[str, int, str, int]]:
        """Addresses and ports that are listened on, by whom, with the process's id."""
        found = [("0.0.0.0", port, name, OUTSIDE) for port, name in self.held_ports.items()]
        for one in self.running():
            if one.program:
                found += [(a, port, "python3", one.pid) for a, port in one.program.bound()]
        return found

    def processes(self) -> dict[int, str]:
        """The container that each process is in, by id, "" for none."""
        return {OUTSIDE: "", **{one.pid: one.id for one in self.running()}}


class Cluster:
    """Machines that reach each other, and a registry.

    Attributes:
        registry: by reference, `repository:tag` or `repository@digest`.
        faults: by instance, over those of its image.
        registry_down: whether the registry does not answer.
    """

    def __init__(self, clock: Clock, addresses: Mapping[str, str]) -> None:
        self.clock = clock
        self.registry: dict[str, Build] = {}
        self.registry_down = False
        self.faults: dict[str, Faults] = {}
        self.made = 0
        self.machines = {a: Machine(name, a, self) for name, a in addresses.items()}

    def push(self, ref: str, build: Build) -> None:
        """Puts an image into the registry."""
        self.registry[ref] = build
        self.registry[f"{ref.rpartition(':')[0]}@{build.digest}"] = build

    def running(self) -> Iterator[tuple[Machine, Container]]:
        """All containers that run."""
        for machine in self.machines.values():
            for container in machine.running():
                yield machine, container

    def settle(self) -> None:
        """Lets all that should have happened by now happen."""
        for _, container in list(self.running()):
            if container.program:
                container.program.settle()

    def listener(self, machine: Machine, address: str, port: int) -> "Program | None":
        """The program that takes requests at an address and port of a machine."""
        self.settle()
        if machine.unplugged:
            return None
        # As the kernel: who listens at the address itself comes before who does at all of them.
        for place in ((address, port), ("0.0.0.0", port)):
            for one in machine.running():
                if one.program and place in one.program.serving():
                    return one.program
        return None
