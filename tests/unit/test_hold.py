"""A hold keeps every run from working on a deployment, until it is released."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pd_deploy.cli import lock, locks, plan, planned
from pd_deploy.cli import status as showing
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import LeaseHeld, NoSuchGeneration, OnHold
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.prune import prune
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.flows.teardown import teardown
from pd_deploy.records.releases import Hold
from tests.memory.calls import Moment
from tests.memory.world import World

HOLD = Hold(by="me on desk", when=datetime(2025, 7, 23, tzinfo=UTC), reason="switch S12")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    return world


def hold(world: World, hold: Hold | None = HOLD) -> Hold | None:
    return world.asked(locks.changed(load_deployment(world.path), hold))


@pytest.mark.parametrize("flow", [deploy, rollback, recover, prune, teardown])
def test_no_run_works_on_what_is_held_and_all_do_when_it_is_released(
    world: World, flow: Any
) -> None:
    assert world.shared_run(deploy, image=world.push("20250723_1")).completed
    assert hold(world) is None
    before = world.state()
    ended = world.run(flow)
    assert isinstance(ended.error, OnHold)
    assert "found it held by me on desk, since 2025-07-23 00:00:00: switch S12" in str(ended.error)
    assert world.state() == before
    assert world.completes()
    assert hold(world, None) == HOLD
    assert world.run(flow).completed


def test_a_run_that_waits_for_another_is_told_of_a_hold_that_comes_meanwhile(world: World) -> None:
    """It has read the record before it has the lease."""
    placed: list[Moment] = []
    record = world.record().held(HOLD).model_dump_json().encode()

    def place(moment: Moment) -> None:
        if moment.what == "lease take" and not moment.after and not placed:
            placed.append(moment)
            world.machines["a"].disk.put("/var/lib/pd-deploy/qwq-3p1d/record.json", record, 0o600)

    assert isinstance(world.run(deploy, watch=place).error, OnHold)


def test_a_run_under_way_is_not_overtaken(world: World) -> None:
    refused: list[BaseException] = []
    world.change(gates={"lease": 1, "lease_lasts": 600})
    killed = world.run(deploy, image=world.push("20250723_1"), kill_at=60)
    assert killed.killed
    try:
        hold(world)
    except LeaseHeld as error:
        refused.append(error)
    assert refused
    assert world.record().hold is None


def test_it_is_on_every_host_and_shown(world: World) -> None:
    hold(world)
    assert world.record("a").hold == world.record("b").hold == HOLD
    deployment = load_deployment(world.path)
    told = world.asked(locks.status(deployment)).splitlines()
    assert told == [
        "a (10.0.0.1): free",
        "b (10.0.0.2): free",
        "held by me on desk, since 2025-07-23 00:00:00: switch S12",
    ]
    world.machines["b"].unplug()
    assert world.asked(locks.status(deployment)).splitlines()[1].startswith("no answer from host b")


def test_a_hold_of_somebody_else_is_not_replaced(world: World) -> None:
    hold(world)
    with pytest.raises(OnHold, match=r"found it held by .*switch"):
        hold(world, HOLD.model_copy(update={"by": "somebody else", "reason": "mine"}))
    assert world.record().hold == HOLD
    again = HOLD.model_copy(update={"reason": "switch S13, too"})
    assert hold(world, again) == HOLD
    assert world.record().hold == again
    done = CliRunner().invoke(lock.app, ["hold", str(world.path), "--reason", " "])
    assert (done.exit_code, world.record().hold) == (2, again)


def test_a_plan_says_that_no_run_would_do_it_now(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(world)
    monkeypatch.setattr(planned, "of", lambda *of: world.asked(planned.look(*of)))
    shown = plan.written(world.path, None, format="text", full=False, host=None, facts=None).text
    assert f"no run would do it now: held by {HOLD}" in shown
    assert f"Next: pd-deploy lock release {world.path}" in shown


def test_status_names_who_holds_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    hold(world)

    async def tell() -> str:
        async with showing.open_session(load_deployment(world.path)) as session:
            return showing.text(await showing.tell(session, None))

    assert "held by       me on desk, since" in world.asked(tell())


def test_what_never_was_deployed_is_not_held(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(NoSuchGeneration, match="expected a record of what was deployed"):
        hold(world)
    world.deploy()
