"""What `pd-deploy diff` tells: the file against what serves."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.cli import diff, hosts
from pd_deploy.cli.diff import Diff
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import HostUnreachable
from pd_deploy.flows import survey
from pd_deploy.flows.deploy import deploy
from pd_deploy.records.releases import Release
from pd_deploy.steps import comparing
from pd_deploy.steps.rollout import Rollout
from tests.memory.world import REPOSITORY, ROOT, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    return world


def compared(world: World) -> Diff:
    return world.asked(diff.compared(load_deployment(world.path)))


def test_what_serves_as_the_file_says_has_no_drift(world: World) -> None:
    difference = compared(world)
    assert not difference.is_drift
    assert diff.text(difference) == f"qwq-3p1d: {world.serving()} serves, as the file says"


def test_a_build_that_a_run_was_given_is_no_drift(world: World) -> None:
    assert world.run(deploy, image=world.push("20250723_1")).completed
    assert not compared(world).is_drift


@pytest.mark.parametrize(
    ("change", "key", "parts"),
    [
        (
            {"settings": {"decode": {"environment": {"EXAMPLE": "1"}}}},
            'settings.decode.environment.EXAMPLE: (not set) → "1"',
            ["d0 on b"],
        ),
        ({"proxy": {"c0": {"port": 7100}}}, "proxy.c0.port: 7000 → 7100", ["c0 on a"]),
    ],
)
def test_keys_and_the_instances_that_they_change_are_named(
    world: World, change: dict[str, Any], key: str, parts: list[str]
) -> None:
    world.change(**change)
    difference = compared(world)
    assert difference.is_drift
    assert list(difference.parts) == parts
    text = diff.text(difference)
    assert f"  {key}\n" in text
    assert re.search(r"^  \+.*(EXAMPLE|7100)", text, re.MULTILINE)
    assert "a: stop omni-infer-proxy" in text
    # The name of each generation is in every path: that is no difference.
    assert not re.search(r"^  [-+].*\d+-[0-9a-f]{8}", text, re.MULTILINE)


def test_a_plan_and_the_generation_made_of_it_name_what_changes(world: World) -> None:
    before = world.serving()
    world.change(settings={"decode": {"environment": {"EXAMPLE": "1"}}}, gates={"ready": 33})

    async def planned() -> Rollout:
        async with hosts.connected(load_deployment(world.path)) as reached:
            return await survey.plan(reached.session, None, "a look")

    said = f"changed against {before}: gates.ready, settings.decode.environment.EXAMPLE"
    assert world.asked(planned()).said_of_changes == said
    assert world.run(deploy).completed
    assert world.asked(planned()).said_of_changes == said


def test_what_changes_is_named_in_a_bounded_line() -> None:
    release = Release(
        generation="1-0123abcd", servers="1-0123abcd", servers_fingerprint="0123abcd",
        chosen_image="r/i:1", pinned_image="r/i@sha256:1", file_image="r/i:1", hosts={},
        logs="/logs/x/1-0123abcd", created=datetime.now(UTC), started_by="",
    )  # fmt: skip
    again = release.model_copy(update={"pinned_image": "r/i@sha256:2", "code": ("sha256:3",)})
    assert comparing.named(release, again, []) == ("image i:1, pushed again", "code")
    assert comparing.named(release, release, ["image"]) == (comparing.OTHERWISE,)
    assert comparing.named(release, release, list("abcdefghijklmnop"))[-1] == "and 4 more keys"


def test_another_image_of_the_file_is_named_as_it_stands_there(world: World) -> None:
    world.change(image=world.push("20250724_1"))
    assert compared(world).keys == {
        "image": (f'"{REPOSITORY}:20250722_26"', f'"{REPOSITORY}:20250724_1"')
    }


def test_a_key_that_nothing_runs_by_is_told_and_is_no_drift(world: World) -> None:
    world.change(gates={"ready": 33})
    difference = compared(world)
    assert not difference.is_drift
    assert "gates.ready: 20.0 → 33.0" in diff.text(difference)


def test_a_file_that_was_changed_on_a_host_is_drift(world: World) -> None:
    path = f"{ROOT}/{world.serving()}/d0/start.sh"
    world.machines["b"].disk.put(path, b"exit 1", 0o700)
    difference = compared(world)
    assert difference.is_drift
    assert list(difference.changes) == [f"b: write {path}"]


def test_before_anything_is_deployed_all_is_new(tmp_path: Path) -> None:
    difference = compared(World(tmp_path))
    assert difference.is_drift
    assert "nothing serves, the file makes 1-" in diff.text(difference)


def test_a_saved_generation_that_cannot_be_read_is_said(world: World) -> None:
    for machine in world.machines.values():
        machine.disk.put(f"{ROOT}/{world.serving()}/plan.json", b"{", 0o600)
    world.change(proxy={"c0": {"port": 7100}})
    text = diff.text(compared(world))
    assert "can't be compared with what serves: " in text
    assert "a run would:" in text


def test_a_host_that_is_away_leaves_nothing_to_compare(world: World) -> None:
    world.machines["b"].unplug()
    with pytest.raises(HostUnreachable) as caught:
        compared(world)
    assert "\n  host a (10.0.0.1): answers\n  host b (10.0.0.2): no SSH" in str(caught.value)
