"""Runs of the engine sglang on hosts in memory: deploy, upgrade, the way back."""

from pathlib import Path

import pytest

from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from pd_deploy.flows.rollback import rollback
from tests.memory import answers
from tests.memory.machine import Faults
from tests.memory.world import SGLANG, World
from tests.unit.test_held_requests import Watch

HOLD = {"proxy": {"c0": {"hold": 50}}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, of=SGLANG)


def test_a_deploy_an_upgrade_and_a_rollback_move_the_whole_set(world: World) -> None:
    """An image that does not say which options it takes is deployed all the same."""
    world.deploy()
    first = world.serving()
    world.assert_coherent()
    outcome = world.run(deploy, image=world.push("v0.5.24", answer="no such Python"))
    assert outcome.completed, outcome.error
    assert "KV transfer proven by the servers' counters" in outcome.message
    assert world.serving() != first
    assert world.run(rollback).completed
    assert world.serving() == first
    world.assert_coherent()


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"p1": Faults(dies=0)}, "`ready p1`"),
        ({"d0": Faults(wrong_kv=True)}, "`smoke test`"),
    ],
    ids=["dies", "other KV"],
)
def test_a_bad_image_gives_way_to_the_one_before(
    world: World, faults: dict[str, Faults], why: str
) -> None:
    world.deploy()
    first = world.serving()
    outcome = world.run(deploy, image=world.push("v0.5.24", faults))
    assert f"failed at {why}" in str(outcome.error)
    assert world.serving() == first
    world.assert_coherent()


def test_an_option_that_the_images_server_does_not_take_is_refused_while_the_old_one_serves(
    world: World,
) -> None:
    """By what the image says; if the file insists, the server says so itself, and ends."""
    world.deploy()
    before = world.runs()
    world.change(settings={"decode": {"arguments": {"cuda-graph-bs-decode": "8 16"}}})
    early = answers.sglang("0.5.10", without=["--cuda-graph-bs-decode"])
    outcome = world.run(deploy, image=world.push("v0.5.10", answer=early))
    assert "decode.d0.arguments.cuda-graph-bs-decode" in str(outcome.error)
    assert "an option that the image's server (sglang 0.5.10) takes" in str(outcome.error)
    assert world.runs() == before
    assert not world.record().quarantine

    given = {"arguments": {"disaggregation-decode-tp": 8}}
    world.change(settings={"decode": given}, allow=["image-options"])
    outcome = world.run(deploy)
    assert "unrecognized arguments: --disaggregation-decode-tp 8" in str(outcome.error)
    assert world.runs().keys() == before.keys()
    world.assert_coherent()


def test_somebody_has_the_routers_port_through_the_whole_run(world: World) -> None:
    """Although the router imports for seconds before it listens."""
    world.change(**HOLD)
    world.deploy()
    watch = Watch(world)
    assert world.run(deploy, image=world.push("v0.5.24"), watch=watch).completed
    assert watch.answers == ["proxy", "room", "proxy"]
    world.assert_coherent()


def test_a_router_from_before_the_key_leaves_its_port_and_takes_it_again(world: World) -> None:
    """It can't share it: so the room leaves before it comes back."""
    world.deploy()
    world.change(**HOLD)
    watch = Watch(world)
    outcome = world.run(
        deploy, image=world.push("v0.5.24", {"d0": Faults(garbage=True)}), watch=watch
    )
    assert "The service is back" in str(outcome.error)
    assert watch.answers == ["proxy", "room", "nobody", "proxy"]
    world.assert_coherent()


def test_a_router_that_ended_is_brought_back_alone(world: World) -> None:
    world.deploy()
    before, router = world.runs(), world.running()["c0"]
    world.machines["a"].end(router, 137)
    assert world.run(health).word == "Mended"
    world.assert_coherent()
    assert {name for name, run in world.runs().items() if run != before[name]} == {"c0"}
