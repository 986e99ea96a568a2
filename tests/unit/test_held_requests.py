"""What clients find at the proxy's port during runs with `proxy.hold`, on hosts in memory."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pd_deploy import engines
from pd_deploy.config.load import load_deployment
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from pd_deploy.flows.teardown import teardown
from pd_deploy.planning import placement
from pd_deploy.tasks import composed
from tests.memory.calls import Moment
from tests.memory.machine import Build, Container, Faults
from tests.memory.programs import Proxy, WaitingRoom
from tests.memory.world import CHANGES, NAME, PROXY_PORT, World
from tests.unit import example

HELD = "held 3 requests for up to 2.5 s, told 1 request to try again (503)"
GATES = CHANGES["gates"]
FAULTS = {"d0": Faults(garbage=True)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.change(proxy={"c0": {"hold": 50}})
    world.deploy()
    assert world.waiting_rooms() == [], "nothing served before, so nobody asks"
    return world


class Watch:
    """What clients find at each moment: the proxy, a waiting room, or nobody."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.answers: list[str] = []
        self.rooms: dict[str, Container] = {}

    def __call__(self, _: Moment) -> None:
        machine = self.world.machines["a"]
        port = self.world.example.proxy_port
        program = self.world.cluster.listener(machine, machine.address, port)
        answer = "room" if isinstance(program, WaitingRoom) else "nobody"
        answer = "proxy" if isinstance(program, Proxy) else answer
        if answer not in self.answers[-1:]:
            self.answers.append(answer)
        self.rooms |= {room.id: room for room in self.world.waiting_rooms()}


def in_use(world: World) -> Container | None:
    """The room that has the port."""
    return next((r for r in world.waiting_rooms() if r.program and r.program.serving()), None)


@pytest.mark.parametrize("faults", [{}, FAULTS], ids=["upgrade", "rolled back"])
def test_somebody_has_the_port_through_the_whole_run(world: World, faults: Any) -> None:
    """One room, also for the way back; it is gone in the end, and the run says what it did."""
    watch = Watch(world)
    outcome = world.run(deploy, image=world.push("20250725_1", faults), watch=watch)
    assert watch.answers == ["proxy", "room", "proxy"]
    assert HELD in (outcome.message or str(outcome.error))
    assert outcome.completed is not faults
    (room,) = watch.rooms.values()
    assert_is_no_part_of_a_generation(room)
    assert world.waiting_rooms() == []
    world.assert_coherent()


def assert_is_no_part_of_a_generation(room: Container) -> None:
    """It claims no port and no device, and nothing of the host but its network."""
    options = json.loads(room.config["Cmd"][-1])
    assert options.pop("lasts") > 2 * GATES["ready"], "as long as models load, and load again"
    assert options == {"port": PROXY_PORT, "proxy": "10.0.0.1", "hold": 50}
    config = room.config["HostConfig"]
    assert config["NetworkMode"] == "host"
    assert not any(config.get(key) for key in ("Privileged", "Devices", "Mounts", "Binds"))
    assert room.labels == {
        "pd-deploy.deployment": NAME,
        "pd-deploy.role": "waiting-room",
        "pd-deploy.proxy": "c0",
    }


def test_a_generation_from_before_the_key_comes_back_with_its_room(world: World) -> None:
    """It is the file as it is now that says how clients are treated."""
    world.change(proxy={"c0": {"hold": 0}}, settings={"all": {"environment": {"EXAMPLE": "1"}}})
    assert world.run(deploy).completed
    world.change(proxy={"c0": {"hold": 50}})
    dead, machine = world.running()["p0"], world.machines["a"]
    machine.end(dead, 1)
    watch = Watch(world)
    outcome = world.run(recover, watch=watch)
    assert outcome.completed, outcome.error
    assert watch.answers == ["proxy", "room", "proxy"]
    assert HELD in outcome.message


@pytest.mark.parametrize("when", ["in use", "nothing else serves"])
def test_the_next_run_finds_what_a_dead_one_has_left(world: World, when: str) -> None:
    """It takes it over where the proxy has to start again, so those who wait have their answers;
    otherwise the room goes out of the proxy's way."""

    def is_left(room: Container) -> bool:
        program = room.program
        if not isinstance(program, WaitingRoom):
            return False
        proxy_runs = any(isinstance(one.program, Proxy) for one in world.running().values())
        return {
            "in use": bool(program.serving()),
            "nothing else serves": bool(program.serving()) and not proxy_runs,
        }[when]

    killed = world.run(deploy, image=world.push("20250725_1"), watch=dies_once(world, is_left))
    assert killed.error, when
    (left,) = world.waiting_rooms()
    world.pass_by(60)
    watch = Watch(world)
    again = world.run(recover, watch=watch)
    assert again.completed, again.error
    assert watch.rooms.keys() <= {left.id}
    assert watch.answers[-1] == "proxy"
    assert "nobody" not in watch.answers
    assert world.waiting_rooms() == []
    world.assert_coherent()


class _Dead(BaseException):
    pass


def dies_once(world: World, is_left: Callable[[Container], bool]) -> Callable[[Moment], None]:
    """What kills a run as soon as it has made such a room."""

    def watch(_: Moment) -> None:
        if any(map(is_left, world.waiting_rooms())):
            raise _Dead

    return watch


@pytest.mark.parametrize("fault", ["no Python", "ends", "deaf"])
def test_a_room_that_fails_fails_nothing(world: World, fault: str) -> None:
    """Connections are refused then, as without one."""
    image = world.push("20250725_1")
    build = world.cluster.registry[image]
    if fault == "no Python":
        world.cluster.push(image, Build(build.digest, has_python=False))

    def watch(_: Moment) -> None:
        for room in world.waiting_rooms():
            if not isinstance(room.program, WaitingRoom):
                continue
            if fault == "ends" and in_use(world):
                world.machines["a"].end(room, 137)
            elif fault == "deaf":
                room.program.signals = [s for s in room.program.signals if s != "SIGUSR2"]

    outcome = world.run(deploy, image=image, watch=watch)
    assert outcome.completed, outcome.error
    world.assert_coherent()
    assert world.waiting_rooms() == []


def test_nothing_is_held_for_a_place_that_the_proxy_leaves(world: World) -> None:
    world.change(proxy={"c0": {"port": PROXY_PORT + 1}})
    watch = Watch(world)
    assert world.run(deploy, watch=watch).completed
    assert watch.answers == ["proxy", "nobody"]
    assert watch.rooms == {}


def test_nothing_is_held_when_nothing_serves_in_the_end(world: World) -> None:
    world.cluster.faults["p2"] = Faults(dies=1)
    watch = Watch(world)
    outcome = world.run(deploy, image=world.push("20250725_1"), watch=watch)
    assert "Nothing serves" in str(outcome.error)
    assert watch.answers == ["proxy", "room", "nobody"]
    assert in_use(world) is None
    assert world.run(teardown, name=NAME).completed
    assert world.waiting_rooms() == []


@pytest.mark.parametrize(
    ("file", "arguments", "shares"),
    [
        ("qwq-3p1d", {}, True),
        ("deepseek-v3-2-a3", {}, True),
        ("deepseek-v3-2-a3", {"no_reuseport": True}, False),
        ("vllm-gpu-3p1d", {}, False),
    ],
)
def test_who_shares_the_port_is_known(file: str, arguments: dict[str, bool], shares: bool) -> None:
    """One that does not would fail at a port that is not free yet."""
    deployment = load_deployment(example.ROOT / f"deployments/{file}.yaml")
    (proxy,) = placement.derive(deployment).proxies
    proxy = replace(proxy, entry=proxy.entry.model_copy(update={"arguments": arguments}))
    assert engines.get(deployment.engine).shares_port(proxy, "") is shares


def test_how_many_requests_are_left_is_told_while_the_proxy_drains(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that it has changed; those that the file gives no more time are cut."""
    world.change(proxy={"c0": {"drain": 20}})
    proxy, told = world.running()["c0"].program, list[str]()
    assert isinstance(proxy, Proxy)
    for seconds in (60, 60, 8):
        proxy.stream(seconds)
    logger = SimpleNamespace(info=lambda line, *_: told.append(line))
    monkeypatch.setattr(composed, "get_run_logger", lambda: logger)
    outcome = world.run(deploy, image=world.push("20250725_1"))
    still = [line for line in told if "still being answered" in line]
    assert still == [
        "3 requests are still being answered; the proxy stops in 15 s at the latest",
        "2 requests are still being answered; the proxy stops in 10 s at the latest",
    ]
    assert "cut 2 requests that were not answered within 20 s (proxy.drain)" in outcome.message
    assert "20.0 s of it for the drain" in outcome.message
    proxy = world.running()["c0"].program
    assert isinstance(proxy, Proxy)
    proxy.stream(60)
    back = world.run(deploy, image=world.push("20250726_1", {"*": Faults(dies=1)}))
    assert "20.0 s of it for the drain" in str(back.error), "the way back tells of it, too"
