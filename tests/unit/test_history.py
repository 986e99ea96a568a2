"""What `pd-deploy history` lists: what runs did and how they failed, also of what was pruned."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pd_deploy.cli import hosts, show
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import ImageNotFound
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from pd_deploy.flows.rollback import rollback
from pd_deploy.records import releases
from pd_deploy.records.releases import ATTEMPTS, Attempt, Outcome, Record
from pd_deploy.steps.host_records import RESERVE_BYTES
from tests.memory.machine import Faults
from tests.memory.world import REPOSITORY, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    return world


def attempts(world: World) -> list[Attempt]:
    return list(releases.attempts(world.asked(hosts.past(load_deployment(world.path))).history))


def results(world: World) -> list[tuple[str, str]]:
    return [(a.result, a.image.rpartition(":")[2]) for a in attempts(world)]


def test_what_was_pruned_stays_in_the_history(world: World) -> None:
    world.change(keep=1)
    for tag in ("20250723_1", "20250724_1", "20250725_1"):
        assert world.run(deploy, image=world.push(tag)).completed
    kept = world.asked(hosts.past(load_deployment(world.path))).history.releases
    assert len(kept) == 2
    assert results(world) == [
        ("good", "20250725_1"),
        ("good", "20250724_1"),
        ("good", "20250723_1"),
        ("good", "20250722_26"),
    ]


def test_failures_and_ways_back_are_listed_each_once(world: World) -> None:
    bad = world.push("20250723_1", {"d0": Faults(garbage=True)})
    assert world.run(deploy, image=bad).error
    assert world.run(deploy, image=bad).error
    why = {"message": "more KV\ncache"}
    assert world.run(deploy, image=world.push("20250724_1"), **why).completed
    assert world.run(rollback, message="too slow").completed
    assert [a.by.rpartition(": ")[2] for a in attempts(world)[:2]] == ["too slow", "more KV cache"]
    made = releases.table(world.asked(hosts.past(load_deployment(world.path))).history)
    assert made[0]["started by"].endswith(": more KV cache")
    assert made[0]["changed"] == "image daily_omniinfer:20250722_26 → daily_omniinfer:20250724_1"
    assert [result for result, _ in results(world)] == ["good", "good", "failed", "failed", "good"]
    assert "smoke test" in attempts(world)[2].reason


def test_a_restart_of_what_serves_is_listed(world: World) -> None:
    """By health or by hand; a run with nothing to do is not."""
    d0 = world.running()["d0"]
    world.machines["b"].end(d0, 137)
    assert world.run(health).word == "Mended"
    assert world.run(deploy).completed
    assert [result for result, _ in results(world)] == ["good", "good"]
    restart, first = attempts(world)
    assert (restart.generation, restart.image) == (first.generation, first.image)
    assert restart.reason == "restarted c0, d0, p0, p1, p2"


def test_a_run_that_failed_before_it_had_planned_is_listed(world: World) -> None:
    before = world.runs()
    assert isinstance(world.run(deploy, image=f"{REPOSITORY}:absent").error, ImageNotFound)
    failed, good = attempts(world)
    assert (failed.result, failed.generation) == ("failed", "")
    assert "absent" in failed.reason
    assert failed.by.startswith("run ")
    assert good.result == "good"
    assert world.runs() == before
    assert world.record("a") == world.record("b")
    table = show.attempt_table(world.asked(hosts.past(load_deployment(world.path))))
    assert "absent" in table.splitlines()[1]


def test_nothing_is_written_where_nothing_was_recorded(tmp_path: Path) -> None:
    """An empty record would hide that the real one was lost."""
    world = World(tmp_path)
    assert world.run(deploy, image=f"{REPOSITORY}:absent").error
    assert world.record().sequence == 0
    table = show.attempt_table(world.asked(hosts.past(load_deployment(world.path))))
    assert table == "no run has changed or tried anything yet"


def test_a_run_that_changes_nothing_is_not_listed(world: World) -> None:
    assert world.run(deploy).completed
    assert len(attempts(world)) == 1


def test_a_record_of_an_older_version_has_what_it_knew(world: World) -> None:
    past = world.asked(hosts.past(load_deployment(world.path))).history
    older = past.record.model_copy(update={"attempts": ()})
    (attempt,) = releases.attempts(releases.merge([older], past.releases.values(), ()))
    assert attempt == past.record.attempts[0]


def test_the_list_is_bounded_and_fits_into_the_room_for_the_record() -> None:
    record, begin = Record(), datetime(2025, 7, 23, tzinfo=UTC)
    for number in range(ATTEMPTS + 20):
        outcome = Outcome(
            result="failed",
            when=begin + timedelta(days=number),
            by=f"run 'qwq-3p1d {number}' (https://prefect.example/runs/{'0' * 36}) by schedule",
            reason="x" * 5000,
        )
        record = record.failed(outcome, outcome.when)
    assert len(record.attempts) == ATTEMPTS
    assert record.attempts[-1].by.startswith(f"run 'qwq-3p1d {ATTEMPTS + 19}'")
    assert len(record.model_dump_json(indent=1)) < RESERVE_BYTES / 2
