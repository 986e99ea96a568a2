"""Hosts in memory keep the contract of real ones."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host
from tests.host_contract import *  # noqa: F403  all of its tests, and their fixtures
from tests.memory import commands, programs
from tests.memory.calls import Calls, Moment
from tests.memory.clock import Clock
from tests.memory.host import MemoryHost
from tests.memory.machine import Build, Cluster, Container, Machine

REPOSITORY = "registry.example/omni"


class Console:
    """Hands on a machine in memory."""

    interface = commands.INTERFACE

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pushed = 0

    def modes(self, directory: str) -> dict[str, str]:
        disk = self.machine.disk
        return {n: f"{disk.entries[f'{directory}/{n}'].mode:o}" for n in disk.names(directory)}

    def date(self, path: str, seconds: int) -> None:
        self.machine.clock.step(seconds)

    @contextmanager
    def small_disk(self, directory: str) -> Iterator[None]:
        self.machine.disk.mount(directory).blocks = 32
        try:
            yield
        finally:
            self.machine.disk.remove(directory)
            del self.machine.disk.volumes[directory]

    def fill(self, directory: str) -> None:
        self.machine.disk.fill(directory)

    def make_read_only(self, directory: str) -> None:
        self.machine.disk.volumes[directory].read_only = True

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        self.machine.unplug()
        yield
        self.machine.plug_in()

    @contextmanager
    def listening(self, port: int) -> Iterator[None]:
        self.machine.held_ports[port] = "somebody"
        yield
        del self.machine.held_ports[port]

    def run_container(self, name: str) -> None:
        (image, *_) = self.machine.images.values()
        config = {"Cmd": ["sleep", "600"], "HostConfig": {}, "Image": next(iter(image.tags))}
        self.machine.containers[name] = Container(name, name, config, image)
        programs.start(self.machine, self.machine.containers[name])

    def remove_container(self, name: str) -> None:
        del self.machine.containers[name]

    def push(self, tag: str) -> str:
        self.pushed += 1
        digest = f"sha256:{self.pushed:064x}"
        self.machine.cluster.push(f"{REPOSITORY}:{tag}", Build(digest))
        return digest


@pytest.fixture
def machine() -> Machine:
    cluster = Cluster(Clock(real=True), {"a": "10.0.0.1"})
    machine = cluster.machines["10.0.0.1"]
    machine.disk.add_directory("/var/lib")
    return machine


@pytest.fixture
async def host(machine: Machine) -> AsyncIterator[Host]:
    host = MemoryHost("a", machine, connect_timeout=0.1)
    machine.silence = 0.2
    yield host
    await host.aclose()


@pytest.fixture
def console(machine: Machine) -> Console:
    return Console(machine)


@pytest.fixture
async def image(host: Host, console: Console) -> str:
    console.push("1")
    await host.docker.pull(f"{REPOSITORY}:1")
    return f"{REPOSITORY}:1"


async def test_a_draft_is_closed_to_others_until_it_is_whole(machine: Machine) -> None:
    """Whatever mode the file is to have: it may hold a secret."""
    calls, modes = Calls(), list[int]()

    def watch(moment: Moment) -> None:
        if moment.what.startswith("draft") and moment.after:
            modes.append(machine.disk.entries[moment.what.removeprefix("draft ")].mode)

    calls.watch = watch
    await MemoryHost("a", machine, calls).write_files({"/var/lib/x": File(b"secret", 0o644)})
    assert modes == [0o600]
    assert machine.disk.entries["/var/lib/x"].mode == 0o644
