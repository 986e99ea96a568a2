"""On hosts in memory: images in files of the controller's, and turns of hosts that pull."""

from pathlib import Path

import pytest

from pd_deploy.config.load import load_deployment
from pd_deploy.errors import (
    ConnectionDropped,
    DiskFull,
    ImageNotFound,
    InvalidInput,
    WrongArchitecture,
    faults_of,
)
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from pd_deploy.registry.tags import NEWEST
from tests.archives import Image
from tests.memory.calls import Moment
from tests.memory.world import FIRST, NAME, World

ONE, TWO = Image("one"), Image("two")


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A deployment whose image is in a file beside it."""
    world = World(tmp_path)
    (tmp_path / "one.tar").write_bytes(ONE.saved("omni:1"))
    (tmp_path / "two.tar").write_bytes(TWO.laid_out())
    world.change(image="file:one.tar", kv_parallel_size="prefill-pods-plus-one", keep=1)
    return world


def loads(moments: tuple[Moment, ...]) -> list[str]:
    return sorted(m.host for m in moments if m.what.startswith("load ") and not m.after)


def images(world: World) -> dict[str, set[str]]:
    """By host, the ids of its images."""
    return {name: set(machine.images) for name, machine in world.machines.items()}


def test_it_is_sent_to_the_hosts_that_lack_it_and_runs_by_its_id(world: World) -> None:
    first = world.run(deploy)
    assert first.completed
    assert loads(first.moments) == ["a", "b"]
    assert {one.config["Image"] for one in world.running().values()} == {ONE.id}
    generation = world.assert_coherent()
    for machine in world.machines.values():
        assert machine.images[ONE.id].tags == {"omni:1", f"pd-deploy/{NAME}:{generation}"}
    # What serves is the image of the file's name; nobody has to read the file again.
    (world.path.parent / "one.tar").unlink()
    again = world.run(deploy)
    assert "nothing to do" in again.message


def test_the_next_build_has_a_file_of_its_own(world: World) -> None:
    assert world.run(deploy).completed
    upgrade = world.run(deploy, image="file:./two.tar")
    assert upgrade.completed, upgrade.error
    assert {one.config["Image"] for one in world.running().values()} == {TWO.id}
    back = world.run(rollback)
    assert back.completed
    assert loads(back.moments) == []
    world.assert_coherent()


def test_what_no_kept_generation_needs_is_removed_and_comes_back_from_its_file(
    world: World,
) -> None:
    assert world.run(deploy).completed
    for name in ("two", "three"):
        (world.path.parent / f"{name}.tar").write_bytes(Image(name).saved())
        assert world.run(deploy, image=f"file:{name}.tar").completed
    kept = {TWO.id, Image("three").id}
    assert images(world) == {"a": kept, "b": kept}
    for machine in world.machines.values():
        machine.images = {k: image for k, image in machine.images.items() if k != TWO.id}
    assert world.run(rollback).completed
    world.assert_coherent()


def test_a_file_that_was_replaced_does_not_stand_for_the_old_image(world: World) -> None:
    assert world.run(deploy).completed
    world.machines["b"].images.clear()
    (world.path.parent / "one.tar").write_bytes(TWO.saved())
    world.machines["b"].containers.clear()
    error = world.run(deploy).error
    (fault,) = faults_of(error) if error else ()
    assert isinstance(fault, ImageNotFound)
    assert f"expected the image {ONE.id[:19]} in {world.path.parent}/one.tar" in str(fault)


def test_one_for_other_machines_is_refused_before_it_is_sent(world: World) -> None:
    assert world.run(deploy).completed
    before = world.runs()
    (world.path.parent / "x.tar").write_bytes(Image("x", "amd64").saved())
    outcome = world.run(deploy, image="file:x.tar")
    assert loads(outcome.moments) == []
    assert outcome.error
    assert {type(fault) for fault in faults_of(outcome.error)} == {WrongArchitecture}
    assert world.runs() == before


def test_hosts_need_room_to_unpack_it(world: World) -> None:
    world.change(disk={"image": 0})
    volume = world.machines["b"].disk.mount("/var/lib/docker")
    volume.blocks = 2
    error = world.run(deploy).error
    assert isinstance(error, DiskFull)
    assert "b (10.0.0.2): expected 0.0 MiB free for the image at /var/lib/docker" in str(error)
    volume.blocks = 1000
    assert world.run(deploy).completed


def test_a_connection_that_is_lost_while_it_is_sent(world: World) -> None:
    dropped = list[Moment]()

    def watch(moment: Moment) -> None:
        if moment.what.startswith("load ") and not moment.after and len(dropped) < 2:
            dropped.append(moment)
            raise ConnectionDropped("cut", host=moment.host)

    outcome = world.run(deploy, watch=watch)
    assert outcome.completed
    assert len(loads(outcome.moments)) == 4
    world.assert_coherent()


def test_there_is_no_newest_file_and_none_that_hosts_have_already(world: World) -> None:
    error = world.run(deploy, image=NEWEST).error
    assert isinstance(error, InvalidInput)
    assert "expected an image of a registry, of which newer builds can be listed" in str(error)
    world.change(pull="never")
    with pytest.raises(InvalidInput, match="expected no `pull: never` with an image in a file"):
        load_deployment(world.path)


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (8, 2)])
@pytest.mark.parametrize("verb", ["pull", "load"])
def test_hosts_take_turns(world: World, verb: str, at_once: int, most: int) -> None:
    world.change(pull_at_once=at_once)
    if verb == "pull":
        world.change(image=FIRST)
    assert world.run(deploy).completed  # so that the image is known, and not asked on a host first
    for machine in world.machines.values():
        machine.containers.clear()
        machine.images.clear()
        machine.pulls_for = 5
    at_work = [0]

    def watch(moment: Moment) -> None:
        if moment.what.startswith(f"{verb} "):
            at_work.append(at_work[-1] + (-1 if moment.after else 1))

    assert world.run(deploy, watch=watch).completed
    assert max(at_work) == most
