"""Events that runs emit, and the automations in cli/notifications.yaml that wait for them."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from prefect.events.schemas.automations import AutomationCore

from pd_deploy.cli import notify
from pd_deploy.errors import LeaseLost, PdDeployError
from pd_deploy.flows import events, outcomes
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from tests.memory.programs import Faults
from tests.memory.world import ROOT, Outcome, World
from tests.unit.test_host_faults import after_stop_of, once

BLOCK = UUID(int=7)
AUTOMATIONS = [one.model_dump(mode="json") for one in notify.automations(BLOCK)]
EVERY = {value for name, value in vars(events).items() if name.isupper()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def told(world: World) -> list[str]:
    """The events since the last time, in order; all are of the service, with one line of text."""
    emitted = list(world.events)
    world.events.clear()
    for event in emitted:
        assert event["resource"] == {
            "prefect.resource.id": "pd-deploy.deployment.qwq-3p1d",
            "prefect.resource.name": "qwq-3p1d",
        }
        assert re.fullmatch(r"\S.*\S", event["payload"]["message"])
    return [event["event"] for event in emitted]


def test_each_generation_that_begins_to_serve_is_told_once(world: World) -> None:
    assert world.run(deploy).completed
    payload = world.events[0]["payload"]
    assert payload["generation"] == world.serving()
    assert payload["image"] in payload["message"]
    assert told(world) == [events.PROMOTED]
    assert world.run(deploy).completed
    assert told(world) == []
    assert world.run(deploy, image=world.push("20250724_1")).completed
    assert told(world) == [events.PROMOTED]
    assert world.run(rollback).completed
    assert told(world) == [events.PROMOTED]


def test_a_rollback_and_a_quarantine_are_told(world: World) -> None:
    world.deploy()
    first, _ = world.serving(), told(world)
    bad = world.push("20250724_1", {"p0": Faults(dies_at_request=1)})
    assert named(world.run(deploy, image=bad)) == outcomes.ROLLED_BACK
    payloads = {event["event"]: event["payload"] for event in world.events}
    assert told(world) == [events.QUARANTINED, events.ROLLED_BACK]
    for payload in payloads.values():
        assert payload["image"] == bad
        assert payload["severity"] == "warning"
    assert payloads[events.ROLLED_BACK]["serving"] == first
    assert f"the service is back on {first}" in payloads[events.ROLLED_BACK]["message"]


@pytest.mark.parametrize("on_failure", ["rollback", "keep"])
def test_that_nothing_serves_is_told(world: World, on_failure: str) -> None:
    """Where nothing did before, where a failed generation is kept, and by each try to mend it."""
    bad = world.push("20250724_1", {"p0": Faults(dies_at_request=1)})
    outcome = world.run(deploy, image=bad, on_failure=on_failure)
    assert named(outcome) == outcomes.NOTHING_SERVES
    assert told(world) == [events.DOWN]


def test_a_way_back_that_fails_leaves_nothing_that_serves_and_is_told(world: World) -> None:
    world.deploy()
    told(world)
    port = int(world.running()["d0"].labels["pd-deploy.ports"].split(",")[0])
    image, ports = world.push("20250724_1"), world.machines["b"].held_ports

    watch = once(after_stop_of(world, "d0"), lambda: ports.__setitem__(port, "nc"))
    reports = []

    async def publish(*, key: str, **artifact: Any) -> None:
        reports.append(artifact.get("markdown", ""))

    outcome = world.run(deploy, image=image, watch=watch, artifacts=publish)
    assert "Nothing serves" in str(outcome.error)
    assert "Nothing serves" in "".join(reports)
    assert named(outcome) == outcomes.NOTHING_SERVES
    assert told(world) == [events.DOWN]
    outcome = world.run(recover)
    assert "Nothing serves" in str(outcome.error)
    assert "after the old generation stopped" not in str(outcome.error), "nothing was stopped"
    assert named(outcome) == outcomes.NOTHING_SERVES
    assert set(told(world)) == {events.DOWN}
    ports.clear()
    assert world.run(recover).completed
    assert told(world) == []


def test_a_service_that_is_lost_during_a_run_that_fails_before_it_stops_anything_is_told(
    world: World,
) -> None:
    """Here a host starts again."""
    world.deploy()
    told(world)
    image = world.push("20250724_1", {"c0": Faults(dies=0)})
    reboot = once(lambda m: m.what.startswith("create "), world.machines["a"].reboot)
    outcome = world.run(deploy, image=image, watch=reboot)
    assert "\nNothing serves: `pd-deploy recover FILE` once the cause" in str(outcome.error)
    assert named(outcome) == outcomes.NOTHING_SERVES
    assert told(world) == [events.DOWN]
    assert "Nothing serves" in str(world.run(deploy, image=image).error)
    assert world.run(recover).completed
    world.assert_coherent()


@pytest.mark.parametrize(
    ("overtaken", "has_stopped", "down"),
    [(True, False, False), (True, True, False), (False, False, False), (False, True, True)],
    ids=["overtaken before the first stop", "after", "its lease deleted before", "after it"],
)
def test_a_run_that_lost_its_lease_says_only_what_it_knows(
    world: World, overtaken: bool, has_stopped: bool, down: bool
) -> None:
    """Another one may have brought the service up; where nobody works on it, it may be down."""
    world.deploy()
    told(world)
    image = world.push("20250724_1")

    def lose() -> None:
        for machine in world.machines.values():
            disk, path = machine.disk, f"{ROOT}/lease"
            number, token, owner, *rest = disk.read(path).split("\n")
            lines = [str(int(number) + 1), f"{token}x", owner, *rest]
            disk.put(path, "\n".join(lines).encode(), 0o600)
            if not overtaken:
                disk.remove(path)

    stopped = after_stop_of(world, "d0")
    moment = stopped if has_stopped else lambda _: world.record("b").closed is not None
    outcome = world.run(deploy, image=image, watch=once(moment, lose))
    assert isinstance(outcome.error, LeaseLost)
    assert ("Nothing serves" in str(outcome.error)) is down
    assert (named(outcome) == outcomes.NOTHING_SERVES) is down
    assert told(world) == [events.DOWN] * down


def named(outcome: Outcome) -> str:
    """The name of the last state of a run that failed."""
    assert isinstance(outcome.error, PdDeployError)
    return outcomes.name_of(outcome.error)


def test_a_night_that_is_skipped_is_told(world: World) -> None:
    due = datetime.now(UTC) - timedelta(days=1)
    assert world.run(deploy, image="newest", due=due).message.startswith("skipped")
    assert told(world) == [events.SKIPPED]


def test_a_server_that_takes_no_events_fails_no_run(world: World) -> None:
    world.deploy()
    bad = world.push("20250724_1", {"p0": Faults(dies_at_request=1)})
    refused = mock.Mock(**{"append.side_effect": OSError("no server")})
    with mock.patch.object(world, "events", refused):
        assert "The service is back on generation" in str(world.run(deploy, image=bad).error)
    assert refused.append.call_count == 2
    world.assert_coherent()


@pytest.mark.parametrize("automation", AUTOMATIONS, ids=lambda one: one["name"])
def test_each_automation_is_one_that_prefect_takes(automation: dict[str, Any]) -> None:
    made = AutomationCore.model_validate(automation)
    (action,) = made.actions
    assert action.block_document_id == BLOCK  # type: ignore[union-attr]
    assert made.enabled
    expected = set(automation["trigger"]["expect"])
    assert expected <= EVERY or all(name.startswith("prefect.flow-run.") for name in expected)
