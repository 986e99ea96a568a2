"""A service that moves from images of one age to those of another, on hosts in memory."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from tests.memory import answers
from tests.memory.world import ROOT, World

ROLES = "release_1.2.1-202607241407-vllm"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world in which an image with ranktables serves."""
    world = World(tmp_path)
    world.deploy()
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


NIGHTS = {
    "20250723_1": "v0-early",
    "20250901_1": "v0",
    "20260301_1": "v1",
    "20260801_1": "roles",
}


def test_nights_follow_the_images_through_all_ages_and_a_rollback_goes_back(world: World) -> None:
    first = world.serving()
    # Two prefills of v1 on a host need ports of their own.
    world.change(prefill={"p1": {"environment": {omniinfer.BASE_PORT: 15600}}}, keep=9)
    for tag, name in NIGHTS.items():
        world.push(tag, answer=answers.of(name))
        outcome = world.run(deploy, image="newest", due=datetime.now(UTC))
        assert outcome.completed, outcome.error
        plan = world.machines["a"].disk.read(f"{ROOT}/{world.serving()}/plan.json")
        assert f'"contract": "{name}"' in plan
        assert world.completes()
    assert world.run(rollback, generation=first).completed
    assert world.serving() == first
    assert world.completes()


def test_a_night_whose_image_the_file_does_not_fit_says_why_and_touches_nothing(
    world: World,
) -> None:
    before = world.runs()
    world.push("20260301_1", answer=answers.of("v1"))
    outcome = world.run(deploy, image="newest", due=datetime.now(UTC))
    assert f"prefill.p1: its {omniinfer.BASE_PORT} - 1 port 15566 on host a" in str(outcome.error)
    assert world.runs() == before
    assert not world.record().quarantine
