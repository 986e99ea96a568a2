"""A service whose images have no ranktables, on hosts in memory."""

from pathlib import Path

import pytest

from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from tests.memory import answers
from tests.memory.world import ROOT, World

ROLES = "release_1.2.1-202607241407-vllm"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world in which an image with ranktables serves."""
    world = World(tmp_path)
    assert world.run(deploy).completed
    return world


def test_a_service_moves_on_to_an_image_without_ranktables_and_back(world: World) -> None:
    first = world.serving()
    image = world.push(ROLES, answer=answers.of("roles"))
    outcome = world.run(deploy, image=image)
    assert outcome.completed, outcome.error
    serving = world.serving()
    files = {p for m in world.machines.values() for p, _ in m.disk.files(f"{ROOT}/{serving}")}
    assert not [path for path in files if "ranktable" in path]
    steps = [moment.what for moment in outcome.moments]
    assert not [what for what in steps if what.startswith("device addresses")]
    world.assert_coherent()
    assert "nothing to do, nothing changed" in world.run(deploy, image=image).message

    assert world.run(rollback).completed
    assert world.serving() == first
    world.assert_coherent()


def test_a_host_that_announces_another_address_is_refused_while_the_service_runs(
    world: World,
) -> None:
    image, before = world.push(ROLES, answer=answers.of("roles")), world.runs()
    world.machines["b"].route_address = "192.168.7.2"
    outcome = world.run(deploy, image=image)
    assert "10.0.0.2 of host b (found 192.168.7.2)" in str(outcome.error)
    assert world.runs() == before
    assert not world.record().quarantine
    world.machines["b"].route_address = ""
    assert "(found no default route)" in str(world.run(deploy, image=image).error)
