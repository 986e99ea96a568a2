"""On hosts in memory: when a step fails, those beside it give up; stops come to their end."""

from pathlib import Path

import pytest

from pd_deploy.errors import DiskFull, DockerRefused, FactsError, SeveralFaults
from pd_deploy.flows.deploy import deploy
from tests.memory.calls import Moment
from tests.memory.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    return world


def test_a_full_disk_on_one_host_does_not_wait_for_the_pull_of_another(world: World) -> None:
    image, before = world.push("20250725_1"), world.runs()
    world.machines["b"].pulls_for = 3000

    def watch(moment: Moment) -> None:
        if moment.host == "a" and moment.what.startswith("pull"):
            raise DiskFull("no space left")

    began = world.cluster.clock.seconds()
    outcome = world.run(deploy, image=image, watch=watch)
    assert isinstance(outcome.error, DiskFull)
    assert world.cluster.clock.seconds() - began < 60
    assert world.runs() == before
    world.machines["b"].pulls_for = 0
    assert world.run(deploy, image=image).completed
    world.assert_coherent()


def test_stops_beside_one_that_fails_come_to_their_end(world: World) -> None:
    image, names = world.push("20250725_1"), {n: c.name for n, c in world.running().items()}
    refused, left = list[Moment](), list[set[str]]()

    def watch(moment: Moment) -> None:
        if moment.what == f"stop {names['p0']}" and not refused:
            refused.append(moment)
            raise DockerRefused("can't be stopped")
        if moment.what.startswith("records, ") and refused and not left:  # The way back has begun.
            left.append({name for name, one in world.running().items() if one.name == names[name]})

    error = world.run(deploy, image=image, watch=watch).error
    assert "can't be stopped" in str(error)
    assert left == [{"p0"}]
    world.assert_coherent()


def test_looks_at_other_hosts_may_still_tell_what_is_wrong_there(world: World) -> None:
    pulled = set[str]()  # before that, their disks are looked at for the image

    def watch(moment: Moment) -> None:
        if moment.what.startswith("pull") and moment.after:
            pulled.add(moment.host)
        if moment.host in pulled and moment.what == "disk" and not moment.after:
            raise FactsError("no df", host=moment.host)

    image = world.push("20250725_1")
    world.machines["b"].answers_after = 2
    error = world.run(deploy, image=image, watch=watch).error
    assert isinstance(error, SeveralFaults)
    assert {fault.host for fault in error.faults if isinstance(fault, FactsError)} == {"a", "b"}
