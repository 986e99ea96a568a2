"""Runs on hosts in memory that are cancelled, or meet a fault, at any call: the end is coherent."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import pytest
from prefect import State
from prefect.logging import disable_run_logger
from prefect.logging.handlers import PrefectConsoleHandler

from pd_deploy.errors import ConnectionDropped, HostError
from pd_deploy.flows import interrupts
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.interrupts import Ending, interruptible
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from tests.memory.calls import Moment
from tests.memory.machine import Faults
from tests.memory.world import INSTANCES, ROOT, Outcome, Reports, World
from tests.samples import sampled

EVERY = 211
"""A sample of a run's moments; a prime, so that each way to end one meets calls of all kinds."""
WAYS = ("cancelled", "everything cancelled", "connection lost", "refused", "hangs")


@dataclass(frozen=True)
class Scenario:
    """Hosts before a run, the run and its moments.

    `way_on` is the last one before the way back, if there is a generation to go back to.
    """

    world: World
    flow: Any
    parameters: dict[str, Any]
    moments: Sequence[Moment]
    way_on: int

    def run(self, way: str, moment: Moment, **more: Any) -> tuple[World, Outcome]:
        """A run that ends so at this moment, on hosts of its own."""
        faults = {"connection lost": ConnectionDropped("lost"), "refused": HostError("refused")}
        hows = {"cancelled": "cancel_at", "everything cancelled": "cancel_all_at",
                "hangs": "hang_at"}  # fmt: skip

        def watch(passing: Moment) -> None:
            if way in faults and passing.number == moment.number:
                raise faults[way]

        twin = self.world.twin()
        at = {hows[way]: moment.number} if way in hows else {}
        return twin, twin.run(self.flow, watch=watch, **at, **more, **self.parameters)


def scenario(what: str) -> Scenario:
    world = World(Path(mkdtemp()))
    world.deploy()
    flow, parameters = deploy, {"image": world.push("20250725_1")}
    if what == "rollback":
        assert world.shared_run(deploy, **parameters).completed
        flow, parameters = rollback, {}
    if what == "way back":
        parameters = {"image": world.push("20250726_1", {"d0": Faults(dies=0)})}
    moments = world.twin().shared_run(flow, **parameters).moments
    starts = [m.number for m in moments if m.what.startswith("start ")]
    if what == "recovery":
        world.run(flow, kill_at=starts[-1], **parameters)
        world.pass_by(5)
        flow, parameters = recover, {}
        moments = world.twin().run(flow).moments
        return Scenario(world, flow, parameters, moments, way_on=0)
    way_on = starts[len(starts) // 2 - 1] if what == "way back" else len(moments)
    return Scenario(world, flow, parameters, moments, way_on)


@pytest.mark.parametrize("what", ["upgrade", "rollback", "way back", "recovery"])
def test_whatever_happens_at_a_call_the_end_is_coherent(what: str) -> None:
    """Cancelled once, a run goes back by itself, and says so; so it does after a fault that stays,
    unless that is on the way back. What one connection has lost is asked for again."""
    given = scenario(what)
    assert len(given.moments) > 400
    locked = max(m.number for m in given.moments if m.what.startswith("lease take"))
    for count, moment in enumerate(sampled(given.moments, EVERY)):
        way = WAYS[count % len(WAYS)]
        twin, outcome = given.run(way, moment)
        told = f"{way} {moment}: {outcome.message or outcome.error}"
        is_cancelled = "cancelled" in way
        if moment.number <= given.way_on or (is_cancelled and what != "recovery"):
            assert set(twin.running()) == INSTANCES, told
            assert twin.completes(), told
        if is_cancelled:
            assert outcome.message or what == "way back", told
            assert free(twin) or moment.number < locked, told
        if way != "cancelled" or what == "recovery":
            twin.pass_by(5)
            assert twin.run(recover).completed, told
        twin.assert_coherent()


@pytest.mark.parametrize("what", ["upgrade", "rollback"])
def test_a_cancellation_at_any_write_of_the_record_leaves_it_true(what: str) -> None:
    """Some hosts may have what the run has not been told that it wrote."""
    given = scenario(what)
    writes = [moment for moment in given.moments if "record.json" in moment.what]
    assert len(writes) > 10
    for moment in sampled(writes, 3):
        twin, outcome = given.run("cancelled", moment)
        assert outcome.message, moment
        twin.assert_coherent()


def free(world: World) -> bool:
    """Whether nobody holds a lease."""
    leases = [machine.disk.read(f"{ROOT}/lease") for machine in world.machines.values()]
    return all(lease.split("\n")[1] == "" for lease in leases)


@pytest.fixture(scope="module")
def upgrade() -> Scenario:
    return scenario("upgrade")


@pytest.mark.parametrize(
    ("call", "number", "told"),
    [
        ("records", 0, "Interrupted; nothing that serves was touched"),
        ("create", 0, "Interrupted; the service was not touched"),
        ("start", 2, "was stopped, as the run was interrupted\nThe service is back on generation"),
        ("list", -1, "was brought up; old ones may be left, which the next run removes"),
    ],
)
def test_a_cancelled_run_says_what_became_of_the_service(
    upgrade: Scenario, call: str, number: int, told: str
) -> None:
    ours = [m for m in upgrade.moments if "probe" not in m.what]
    moments = [m for m in ours if m.what.split(" ")[0] == call]
    reports = Reports()
    _, outcome = upgrade.run("cancelled", moments[number], artifacts=reports.publish)
    assert outcome.cancelled
    assert told in outcome.message
    said = {"create": "**Interrupted: ", "start": "**Rolled back:**"}.get(call, "**Cancelled:**")
    assert said in reports.only


def test_a_second_cancellation_ends_the_way_back_at_once_and_says_what_to_run(
    upgrade: Scenario,
) -> None:
    first = next(m for m in upgrade.moments[::-1] if m.what.startswith("start "))
    _, back = upgrade.run("cancelled", first)
    last = next(m for m in back.moments[::-1] if m.what.startswith("start "))
    assert last.number > first.number
    twin = upgrade.world.twin()
    reports = Reports()
    outcome = twin.run(
        deploy,
        cancel_at=first.number,
        cancel_again_at=last.number,
        artifacts=reports.publish,
        **upgrade.parameters,
    )
    assert outcome.cancelled
    assert f"`pd-deploy recover {twin.path}` repairs what is left" in reports.only
    assert "Interrupted again, so ended at once" in outcome.message
    assert f"`pd-deploy recover {twin.path}` makes 1-" in outcome.message
    assert free(twin)
    assert not twin.completes()
    assert twin.run(recover).completed
    twin.assert_coherent()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_task_of_the_run_and_no_other(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(interrupts, "remedy", lambda: "it")
    end, before = Ending(), signal.getsignal(number)

    @interruptible(left="nothing was done", reports=False)
    async def runbook() -> State[None]:
        assert signal.getsignal(number) is not before
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()
        raise AssertionError

    async def beside() -> str:
        other = asyncio.ensure_future(asyncio.Event().wait())
        interrupts.ending.set(end)
        state = await runbook()
        assert not other.cancelling()
        other.cancel()
        return str(state.message)

    with disable_run_logger():
        assert asyncio.run(beside()) == "Interrupted; nothing was done"
    assert end.signals == [number]
    assert end.state
    assert end.state.is_cancelled()
    assert signal.getsignal(number) is before


def test_a_signal_says_what_it_does_to_a_run_of_this_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teardown brings nothing back, and is not to be recovered from."""
    monkeypatch.setattr(interrupts, "remedy", lambda: "`pd-deploy recover x.yaml`")
    first, again = interrupts._told("nothing was touched", interrupts.GOES_BACK)
    assert "brings back what served before" in first
    assert first.endswith("(then run `pd-deploy recover x.yaml`)")
    assert again == "this run ends at once; then run `pd-deploy recover x.yaml`"
    assert interrupts._told("what it removed is gone; run it again", "") == (
        "this run ends; what it removed is gone; run it again",
        "this run ends at once; what it removed is gone; run it again",
    )


@pytest.mark.parametrize("seconds", [0, 3600])
def test_a_report_that_the_server_does_not_take_decides_nothing(
    tmp_path: Path, seconds: int
) -> None:
    """It refuses, or never answers: the run ends as it would, and soon gives its leases back."""

    async def away(**_: object) -> None:
        await asyncio.sleep(seconds)
        raise httpx.ConnectError("All connection attempts failed")

    world = World(tmp_path)
    begin = world.cluster.clock.seconds()
    outcome = world.run(deploy, artifacts=away)
    assert outcome.message.startswith("Generation 1-")
    world.assert_coherent()
    assert world.cluster.clock.seconds() - begin < 60


def test_a_line_that_nobody_reads_does_not_end_a_run() -> None:
    """Its worker, which read them, has died."""
    reader, writer = os.pipe()
    os.close(reader)
    handler = PrefectConsoleHandler(stream=os.fdopen(writer, "w"))
    logging.getLogger().addHandler(handler)
    try:
        interrupts.outlive_reader()
        logging.getLogger("any").error("healthy")
    finally:
        logging.getLogger().removeHandler(handler)
