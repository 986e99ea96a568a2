"""Calls to a host that are cancelled: each ends, and what is said afterwards is so."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pd_deploy.flows.deploy import deploy
from pd_deploy.hosts.container_values import DEPLOYMENT_LABEL, ContainerSpec
from pd_deploy.hosts.files import File
from pd_deploy.steps import containers
from tests.memory.calls import Calls, Moment
from tests.memory.clock import Clock, VirtualLoop
from tests.memory.host import MemoryHost
from tests.memory.machine import Build, Cluster
from tests.memory.world import ROOT, World
from tests.samples import sampled

IMAGE = "r/image:1"
ROOM = "/var/lib/x"
Use = Callable[[MemoryHost], Awaitable[object]]
FILE_CALLS: dict[str, Use] = {
    "write_files": lambda host: host.write_files({f"{ROOM}/{n}": File(b"new") for n in "ab"}),
    "read_file": lambda host: host.read_file(f"{ROOM}/a"),
    "make_dirs": lambda host: host.make_dirs([f"{ROOM}/d/e"]),
    "remove_tree": lambda host: host.remove_tree(ROOM, below="/var/lib"),
}


@pytest.fixture
def host() -> MemoryHost:
    cluster = Cluster(Clock(), {"a": "10.0.0.1"})
    cluster.push(IMAGE, Build("sha256:1"))
    machine = cluster.machines["10.0.0.1"]
    machine.pull(IMAGE, cluster.registry[IMAGE])
    machine.disk.put(f"{ROOM}/a", b"old")
    return MemoryHost("a", machine, Calls())


def on_loop(host: MemoryHost, work: Awaitable[None]) -> None:
    """By a loop that fails when a call never ends."""
    loop = VirtualLoop(host.machine.clock)
    try:
        loop.run_until_complete(asyncio.ensure_future(work, loop=loop))
    finally:
        loop.close()


async def cancelled(host: MemoryHost, use: Use, at: int, *, everything: bool) -> bool:
    """Cancels a use of a host at one of its moments; whether it came that far."""
    here, task = asyncio.current_task(), asyncio.ensure_future(use(host))

    def cancel(moment: Moment) -> None:
        if moment.number == at:
            for one in asyncio.all_tasks() - {here} if everything else {task}:
                one.cancel()

    host.calls.moments.clear()
    host.calls.watch = cancel
    await asyncio.wait({task})
    host.calls.watch = lambda _: None
    return task.cancelled()


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", FILE_CALLS)
def test_a_cancelled_file_call_ends_and_the_next_works(
    host: MemoryHost, name: str, everything: bool
) -> None:
    """Also when the task that reads the answers is cancelled with it, at every moment."""

    async def work() -> None:
        at = 1
        while await cancelled(host, FILE_CALLS[name], at, everything=everything):
            at += 1
            content = await host.read_file(f"{ROOM}/a")
            assert content in (b"old", b"new", None)
            host.machine.disk.put(f"{ROOM}/a", b"old")
            await host.remove_tree(f"{ROOM}/d", below=ROOM)
        assert at > 1
        await host.aclose()

    on_loop(host, work())


def test_a_call_without_a_session_to_answer_it_asks_another(host: MemoryHost) -> None:
    """Everything was cancelled while no call was under way."""

    async def work() -> None:
        await host.read_file(f"{ROOM}/a")
        for one in asyncio.all_tasks() - {asyncio.current_task()}:
            one.cancel()
        assert await host.read_file(f"{ROOM}/a") == b"old"
        await host.aclose()

    on_loop(host, work())


@pytest.mark.parametrize("everything", [False, True])
def test_after_a_cancelled_start_the_host_says_what_is_so(
    host: MemoryHost, everything: bool
) -> None:
    """The request was out: the container runs."""

    async def work() -> None:
        spec = ContainerSpec(name="x", image=IMAGE, labels={DEPLOYMENT_LABEL: "d"})
        made = await host.docker.create(spec)
        assert await cancelled(host, lambda host: host.docker.start(made), 1, everything=everything)
        assert host.machine.containers[made].running
        await host.aclose()

    on_loop(host, work())


async def test_a_cancelled_stop_is_not_told_as_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(_: object, name: str) -> None:
        if name == "p0":
            raise asyncio.CancelledError

    monkeypatch.setattr(containers, "_stop_instance", stop)
    rollout: Any = SimpleNamespace(attempt=SimpleNamespace(started={"p0", "p1"}))
    told = await containers.stop_started(rollout)
    assert "its stop was cancelled" in str(told["p0"])
    assert told["p1"] is None


def test_everything_cancelled_while_files_are_read_ends_the_run_and_frees_the_leases(
    tmp_path: Path,
) -> None:
    """At calls of the kinds that only look."""
    world = World(tmp_path)
    world.deploy()
    image = world.push("20250725_1")
    moments = world.twin().shared_run(deploy, image=image).moments
    looks = {moment.what.partition(" ")[0]: moment for moment in moments if not moment.changes}
    for moment in sampled(list(looks.values()), 2):
        twin = world.twin()
        assert twin.run(deploy, image=image, cancel_all_at=moment.number).cancelled
        for machine in twin.machines.values():
            assert machine.disk.read(f"{ROOT}/lease").split("\n")[1] == "", str(moment)
