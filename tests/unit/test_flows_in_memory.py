"""The flows on hosts in memory: deploy, upgrade, the way back, and recovery from any moment."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.steps.containers import end_of
from pd_deploy.tasks import composed
from tests.memory.machine import Faults, Machine
from tests.memory.world import NAME, ROOT, World
from tests.samples import sampled


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_deploy_serves_and_running_it_again_touches_nothing(world: World) -> None:
    world.deploy()
    before = world.state()
    again = world.run(deploy)
    assert "nothing to do, nothing changed" in again.message
    assert world.state() == before
    world.assert_coherent()


def test_a_run_that_has_nothing_to_do_goes_from_the_survey_to_the_proof(world: World) -> None:
    world.deploy()
    calls = world.run(deploy).moments
    assert [m for m in calls if m.changes and "lease" not in m.what] == []
    assert not [m for m in calls if m.what.startswith(("npu-smi", "disk", "missing paths"))]


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a.disk.put(script(a), b"sleep 1", 0o700),
        lambda a: setattr(a.disk.entries[script(a)], "mode", 0o755),
        lambda a: a.disk.remove(script(a)),
        lambda a: a.disk.remove(ranktable(a)),
        lambda a: a.disk.put(ranktable(a), b"{}"),
        lambda a: a.disk.remove(f"{script(a).rpartition('/')[0].rpartition('/')[0]}/release.json"),
        lambda a: a.disk.remove(f"/data/log_path/{NAME}"),
        lambda a: a.disk.remove(f"{ROOT}/record.json"),
        lambda a: a.disk.put(f"{ROOT}/.record.json.0123abcd.tmp", b"{"),
        lambda a: a.end(next(a.running()), 137),
        lambda a: a.containers.pop(next(a.running()).id),
    ],
    ids=[
        "script changed", "mode changed", "script gone", "ranktable gone", "ranktable changed",
        "release gone", "logs gone", "record gone", "draft left", "container ended",
        "container gone",
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_left_is_put_right(
    world: World, damage: Callable[[Machine], object]
) -> None:
    world.deploy()
    serving, paths = world.serving(), set(world.machines["a"].disk.entries)
    files = dict(world.machines["a"].disk.files(f"{ROOT}/{serving}"))
    damage(world.machines["a"])
    outcome = world.run(deploy)
    assert outcome.completed
    assert world.serving() == serving
    assert set(world.machines["a"].disk.entries) == paths
    again = dict(world.machines["a"].disk.files(f"{ROOT}/{serving}"))
    assert {p: c for p, c in again.items() if not p.endswith("release.json")} == {
        p: c for p, c in files.items() if not p.endswith("release.json")
    }
    assert world.machines["a"].disk.entries[script(world.machines["a"])].mode == 0o700
    world.assert_coherent()
    assert "nothing to do, nothing changed" in world.run(deploy).message


def script(machine: Machine) -> str:
    """A start script on a machine."""
    return next(p for p, _ in machine.disk.files(ROOT) if p.endswith("/p0/start.sh"))


def ranktable(machine: Machine) -> str:
    """A ranktable on a machine."""
    return next(p for p, _ in machine.disk.files(ROOT) if "/ranktables/" in p)


def test_an_upgrade_and_a_rollback_move_the_whole_set(world: World) -> None:
    world.deploy()
    first = world.serving()
    assert world.run(deploy, image=world.push("20250723_1")).completed
    assert world.serving() != first
    assert world.run(rollback).completed
    assert world.serving() == first
    world.assert_coherent()


def test_an_image_for_other_machines_is_refused_while_the_service_runs(world: World) -> None:
    world.deploy()
    image, before = world.push("20250723_1", architecture="amd64"), world.runs()
    for _ in range(2):  # pulled by this run, and then there already
        outcome = world.run(deploy, image=image)
        assert "expected an image for arm64, the host's architecture; found" in str(outcome.error)
        assert "for amd64 → name a tag" in str(outcome.error)
        assert world.runs() == before
    assert not world.record().quarantine


def test_without_a_registry_the_error_says_how_to_go_on_with_what_the_hosts_have(
    world: World,
) -> None:
    image = world.push("20250723_1")
    assert world.run(deploy, image=image).completed
    world.cluster.registry_down = True
    failed = world.run(deploy, image=image)
    said = re.search(r"every host has it: `--image (\S+)` needs no registry", str(failed.error))
    assert said, failed.error
    assert world.run(deploy, image=said[1]).completed
    world.assert_coherent()


@pytest.mark.parametrize(
    "faults",
    [
        {"p1": Faults(dies=0)},
        {"d0": Faults(hangs=True)},
        {"d0": Faults(garbage=True)},
        {"p2": Faults(refuses_kv=True)},
        {"d0": Faults(ignores_kv=True)},
        {"d0": Faults(wrong_kv=True)},
        {"p0": Faults(dies_at_request=1)},
    ],
    ids=lambda faults: ", ".join(f"{name} {fault}" for name, fault in faults.items()),
)
def test_a_bad_image_gives_way_to_the_one_before_and_is_quarantined(
    world: World, faults: dict[str, Faults]
) -> None:
    world.deploy()
    first = world.serving()
    outcome = world.run(deploy, image=world.push("20250724_1", faults))
    assert "The service is back on generation" in str(outcome.error)
    assert world.serving() == first
    assert [one.image for one in world.record().quarantine.values()]
    world.assert_coherent()


def test_an_upgrade_that_is_killed_at_any_moment_is_put_right_by_recovery(world: World) -> None:
    """Before and after a change, once for each state in which that leaves the hosts."""
    world.deploy()
    image = world.push("20250725_1")
    moments = world.new_states(deploy, image=image)
    assert len(moments) > 50
    for moment in sampled(moments, 9):
        twin = world.twin()
        assert twin.run(deploy, image=image, kill_at=moment.number).killed
        twin.pass_by(5)
        outcome = twin.run(recover)
        assert outcome.completed, f"{moment}: {outcome.error}"
        twin.assert_coherent()


@pytest.mark.parametrize("update", [{}, {"update": {"family": "daily", "window": 14_400}}])
def test_a_scheduled_run_that_starts_after_its_window_connects_to_no_host(
    world: World, update: dict[str, object]
) -> None:
    """And says why; so do all that come late, one after the other. An earlier one does its work."""
    world.change(**update)
    window = timedelta(hours=4 if update else 2)
    for nights in (2, 1, 0):
        due = datetime.now(UTC) - window - timedelta(days=nights, minutes=1)
        outcome = world.run(deploy, image="newest", due=due)
        assert outcome.message.startswith("skipped, as it started ")
        assert f"`update.window` of qwq-3p1d is {window.seconds // 3600} h;" in outcome.message
        assert not outcome.moments
    assert not world.containers()
    due = datetime.now(UTC) - window + timedelta(minutes=5)
    assert world.run(deploy, due=due).message.startswith("Generation 1-")
    (outcome_of,) = world.record().outcomes.values()
    assert outcome_of.by.endswith(" by the schedule of pd-deploy")


def test_a_scheduled_run_may_not_keep_a_failed_generation(world: World) -> None:
    """Nobody would look at it, and nobody would be served."""
    outcome = world.run(deploy, on_failure="keep", due=datetime.now(UTC))
    assert "expected `rollback` for a scheduled run" in str(outcome.error)
    assert not outcome.moments


def test_a_run_that_died_is_buried_by_the_one_that_takes_its_lease(world: World) -> None:
    """So that it does not say Running for good. One that gave its lease back is left alone."""
    world.deploy()
    assert not world.buried
    world.run(deploy, image=world.push("20250726_1"), kill_at=150)
    world.pass_by(5)
    assert world.run(recover).completed
    assert len(world.buried) == 1
    assert world.run(recover).completed
    assert len(world.buried) == 1


@pytest.mark.parametrize("by_schedule", [True, False])
def test_a_scheduled_run_waits_for_another_one_when_one_by_hand_gives_up(
    world: World, by_schedule: bool
) -> None:
    """Nobody would start the night again."""
    world.change(gates={"lease": 0.1})
    due = {"due": datetime.now(UTC)} if by_schedule else {}
    first, second = world.both((deploy, {}), (deploy, due))
    assert first.completed
    assert second.completed is by_schedule
    assert by_schedule or "is working on qwq-3p1d" in str(second.error)


def test_servers_that_are_late_together_are_all_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time counts from the same moment, so no one of them is the first. Meanwhile the run's
    log has each one's last line, and not at each look."""
    told: list[str] = []
    logger = SimpleNamespace(info=lambda *line: told.append(line[0]))
    monkeypatch.setattr(composed, "get_run_logger", lambda: logger)
    world.deploy()
    late = {instance: Faults(hangs=True) for instance in ("p0", "p1", "p2", "d0")}
    error = world.run(deploy, image=world.push("20250724_1", late)).error
    steps = ", ".join(sorted(f"`ready {instance}`" for instance in late))
    said = re.search(r"new generation 2-\w+ failed at (.*) because host ", str(error))
    assert said
    assert ", ".join(sorted(said[1].split(", "))) == steps
    progress = [line for line in told if line.startswith("not ready after ")]
    assert len(progress) == len(late)
    assert all(re.match(r"not ready after 1\d s: pd-deploy: starting ", line) for line in progress)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\n\n", "b"),
        ("a\n\rshards:  25% Completed | 1/4\n\rshards:  50% Completed | 2/4\n\r", "50%"),
        ("", ""),
    ],
)
def test_the_last_line_is_the_one_that_people_would_see(text: str, line: str) -> None:
    assert line in end_of(text)
    assert len(end_of(text).splitlines()) <= 1
