"""What `pd-deploy diff` tells: the file against what serves."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pd_deploy.cli import diff, main, planned
from pd_deploy.cli.diff import Diff
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import HostUnreachable
from pd_deploy.flows.deploy import deploy
from pd_deploy.records.releases import Release
from pd_deploy.steps import comparing
from tests.memory.world import NAME, REPOSITORY, ROOT, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    return world


def compared(world: World) -> Diff:
    deployment = load_deployment(world.path)
    return diff.compared(deployment, world.asked(planned.look(deployment, None)))


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

    def said() -> str:
        return world.asked(planned.look(load_deployment(world.path), None)).said

    changes = f"changed against {before}: gates.ready, settings.decode.environment.EXAMPLE"
    assert said().endswith(changes)
    assert world.run(deploy).completed
    assert said().endswith(changes)


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


def shown(world: World, *, full: bool = False) -> str:
    """What `plan` prints."""
    deployment = load_deployment(world.path)
    return planned.text(NAME, world.asked(planned.look(deployment, None)), full=full)


@pytest.mark.parametrize("away", ["a", "b"])
def test_a_host_that_is_away_leaves_the_others_to_compare(world: World, away: str) -> None:
    """Also the one through which the registry is asked."""
    here = "b" if away == "a" else "a"
    world.machines[away].unplug()
    world.machines[here].disk.put(f"{ROOT}/{world.serving()}/c0/start.sh", b"exit 1", 0o700)
    world.change(settings={"decode": {"environment": {"EXAMPLE": "1"}}})
    difference = compared(world)
    assert set(difference.keys) == {"settings.decode.environment.EXAMPLE"}
    assert list(difference.parts) == ["d0 on b"]
    assert difference.changes
    assert all(change.startswith(f"{here}: ") for change in difference.changes)
    text, plan = diff.text(difference), shown(world)
    why = f"no answer from host {away} (10.0.0.{'12'['ab'.index(away)]}): no SSH"
    for told in (text, plan):
        assert f"not complete: a run needs all hosts; {away} is assumed to be as when" in told
        assert told.count(why) == 1
    assert f"== host {here}" in plan
    assert f"== host {away}" not in plan


def test_no_difference_on_the_hosts_that_answer_is_said_as_such(world: World) -> None:
    world.machines["b"].unplug()
    difference = compared(world)
    assert not difference.is_drift
    text = diff.text(difference)
    assert f"{world.serving()} serves, as the file says, as far as the hosts answer\n" in text
    assert "== host a (10.0.0.1)\nnothing to do\n" in shown(world)


@pytest.mark.parametrize(
    ("words", "away", "code"),
    [
        (["plan"], True, 7),
        (["plan", "--format", "json"], True, 7),
        (["plan", "--format", "shell"], True, 1),
        (["plan"], False, 0),
        (["diff"], True, 7),
        (["diff"], False, 0),
    ],
)
def test_the_exit_code_says_whether_hosts_were_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch, words: list[str], away: bool, code: int
) -> None:
    if away:
        world.machines["b"].unplug()
    monkeypatch.setattr(planned, "of", lambda *of: world.asked(planned.look(*of)))
    done = CliRunner().invoke(main.app, [words[0], str(world.path), *words[1:]])
    error = done.exception
    assert (1 if isinstance(error, HostUnreachable) else done.exit_code) == code, error
    told = f"{done.stderr}{error if code == 1 else ''}{'' if 'json' in words else done.stdout}"
    assert ("no answer from host b (10.0.0.2): no SSH connection" in told) is away
    if words == ["plan"]:
        assert ("Next: pd-deploy deploy" in done.stdout) is not away  # a run would be refused
    if "json" in words:
        assert list(json.loads(done.stdout)["hosts"]) == ["a"]


def test_a_host_that_answers_and_cannot_be_looked_at_has_its_row_too(world: World) -> None:
    world.machines["b"].security_options.append("name=rootless")
    rows = shown(world, full=True).splitlines()[-2:]
    assert rows[0].startswith("host b (10.0.0.2): expected Docker to run as root")
    assert rows[1].startswith("→ set the host's `docker_socket`")


def test_without_what_a_host_says_of_itself_the_rest_is_told(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It is kept with the plan; older versions did not."""
    for machine in world.machines.values():
        path = f"{ROOT}/{world.serving()}/plan.json"
        saved = json.loads(machine.disk.read(path))
        assert saved.pop("facts")["b"]["interface"]
        machine.disk.put(path, json.dumps(saved).encode(), 0o600)
    world.machines["b"].unplug()
    world.change(proxy={"c0": {"port": 7100}})
    assert "no plan without host b: " in (plan := shown(world))
    assert "\n== host a\nruns omni-infer" in plan
    text = diff.text(compared(world))
    assert "the file makes what is not known" in text
    assert "  proxy.c0.port: 7000 → 7100\n" in text
    new = World(tmp_path_factory.mktemp("new"))
    new.machines["b"].unplug()
    assert "\n== host a\nnothing of the deployment runs there\n" in shown(new)


def test_without_any_host_there_is_nothing_to_compare(world: World) -> None:
    for machine in world.machines.values():
        machine.unplug()
    with pytest.raises(HostUnreachable, match="expected every host to answer"):
        compared(world)
