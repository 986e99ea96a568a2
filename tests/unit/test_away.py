"""A host that is away while the service is brought back is waited for. On hosts in memory."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.flows import away
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.recover import recover
from pd_deploy.steps import attempt
from tests.memory.calls import Moment
from tests.memory.machine import Faults, Machine
from tests.memory.world import INSTANCES, ROOT, World
from tests.samples import sampled

BAD = {"d0": Faults(garbage=True)}
AWAY_S = 120.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    return world


def way_back(world: World, image: str) -> list[Moment]:
    """The calls that a run makes once the new generation has failed, until the old one opens."""
    moments = world.twin().shared_run(deploy, image=image).moments
    proof = next(m for m in moments if "POST" in m.what)
    plan = f"read {ROOT}/{world.serving()}/plan.json"
    read = next(m for m in moments[proof.number :] if m.what == plan)
    begin = [m for m in moments[: read.number] if "POST" in m.what][-1]
    end = [m for m in moments if m.what.startswith("kill ")][-1]
    return list(moments[begin.number : end.number])


def unplugged(machine: Machine) -> None:
    machine.unplug(AWAY_S)


def powered_off(machine: Machine) -> None:
    machine.reboot()
    machine.unplug(AWAY_S)


def at(moment: Moment, world: World, fault: Callable[[Machine], None]) -> Callable[[Moment], None]:
    def watch(passed: Moment) -> None:
        if passed.number == moment.number:
            fault(world.machines[moment.host])

    return watch


OFFSETS = {unplugged: 0, powered_off: 41}
"""Each way to be away has its own sample of moments."""


@pytest.mark.parametrize("fault", [unplugged, powered_off])
def test_a_way_back_waits_for_a_host_that_is_away_from_any_moment(
    world: World, fault: Callable[[Machine], None]
) -> None:
    """And then brings the service back."""
    first, image = world.serving(), world.push("20250724_1", BAD)
    moments = way_back(world, image)
    assert len(moments) > 100
    for moment in sampled(moments, 300, OFFSETS[fault]):
        twin = world.twin()
        begin = twin.cluster.clock.seconds()
        outcome = twin.run(deploy, image=image, watch=at(moment, twin, fault))
        assert "The service is back on generation" in str(outcome.error), (
            f"{moment}: {outcome.error}"
        )
        twin.pass_by(AWAY_S)
        assert set(twin.running()) == INSTANCES, moment
        assert twin.serving() == first, moment
        assert twin.completes(), moment
        assert twin.cluster.clock.seconds() - begin < 3 * AWAY_S, moment


def test_a_connection_that_is_lost_opens_no_proxy_before_its_proof(world: World) -> None:
    """A recovery finds the proxy open to the smoke test alone. If it took the lost connection for a
    closed port, it would signal once more, which lets clients in."""
    image = world.push("20250724_1", BAD)
    moments = world.twin().shared_run(deploy, image=image).moments
    proofs = [m.number for m in moments if "POST" in m.what]
    signals = [m.number for m in moments if m.what.startswith("kill ") and m.after]
    assert len(signals) == 3
    world.run(deploy, image=image, kill_at=next(n for n in proofs if n > signals[1]))
    world.pass_by(5)
    before = opened(world)
    looks = [m for m in world.twin().run(recover).moments if "GET" in m.what and "127." in m.what]
    assert looks
    for moment in looks[:4]:
        twin, then = world.twin(), list[int]()

        def cut(passed: Moment, twin: World = twin, then: list[int] = then) -> None:
            if passed.number == moment.number:  # noqa: B023
                twin.machines["a"].unplug(20)
            if "POST" in passed.what:
                then.append(opened(twin))

        assert twin.run(recover, watch=cut).completed
        assert then[0] == before, moment
        assert opened(twin) == before + 1


def opened(world: World) -> int:
    """How often the old generation's proxy has let clients in."""
    (proxy,) = (c for c in world.containers() if c.name.startswith("omni-infer-proxy_c0_1"))
    return sum(omniinfer.OPENED in line for _, line in proxy.log)


@pytest.mark.parametrize("fault", [unplugged, powered_off])
def test_a_recovery_waits_for_a_host_that_is_away(
    world: World, fault: Callable[[Machine], None]
) -> None:
    """When it begins, and from any moment of it."""
    first, image = world.serving(), world.push("20250724_1", BAD)
    world.run(deploy, image=image, kill_at=way_back(world, image)[0].number)
    world.pass_by(5)
    moments = list(world.twin().run(recover).moments)
    opened = [number for number, m in enumerate(moments) if m.what.startswith("kill ")][-1]
    for moment in sampled(moments[:opened], 200, OFFSETS[fault]):
        twin = world.twin()
        outcome = twin.run(recover, watch=at(moment, twin, fault))
        assert outcome.completed, f"{moment}: {outcome.error}"
        twin.pass_by(AWAY_S)
        assert twin.serving() == first, moment
        assert twin.completes(), moment


@pytest.mark.parametrize("host", ["a", "b"])
def test_after_its_bound_a_way_back_says_for_which_host_it_waited_and_what_runs(
    world: World,
    host: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the run has started is stopped where that can be done. Then a recovery brings it back;
    while the host is away, it says the same."""
    monkeypatch.setattr(away, "get_run_logger", lambda: logging.getLogger("of.a.run"))
    world.change(gates={"away": 30})
    first, image = world.serving(), world.push("20250724_1", BAD)
    moment = way_back(world, image)[0]

    def unplug(passed: Moment) -> None:
        if passed.number == moment.number:
            world.machines[host].unplug()

    failed = world.run(deploy, image=image, watch=unplug)
    again = world.run(recover)
    where = world.machines[host].address
    for outcome in (failed, again):
        said = str(outcome.error)
        expected = f"host {host} ({where}): expected it to be back within 30 s (gates.away)"
        assert expected in said
        assert "no SSH connection" in said
        assert "run `pd-deploy recover FILE`" in said
        other = {"a": "omni-infer-decode_d0_2", "b": "omni-infer-prefill_p0_2"}[host]
        assert re.search(rf"{other}-\w+ exited", said)
    waiting = f"waiting for at most 30 s (gates.away) for host {host} ({where}): "
    assert caplog.text.count(waiting) == 2
    here = world.machines["b" if host == "a" else "a"]
    assert not list(here.running())
    # It is back while a recovery waits for it.
    world.machines[host].unplug(75)
    assert world.run(recover).completed
    assert caplog.messages[-1] == "all hosts are back; going on"
    assert world.assert_coherent() == first


@pytest.mark.parametrize("faults", [{}, BAD])
def test_downtime_counts_from_when_an_engine_that_restarts_ends_the_service(
    world: World, faults: dict[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an image is pulled, long before the cut-over. The way back counts from there, too."""
    clock = world.cluster.clock
    monkeypatch.setattr(attempt, "datetime", SimpleNamespace(now=lambda _: clock.date()))
    world.machines["b"].pulls_for = 90

    def restart(passed: Moment) -> None:
        if passed.what.startswith("pull ") and passed.host == "b" and not passed.after:
            world.machines["a"].reboot()

    outcome = world.run(deploy, image=world.push("20250724_1", faults), watch=restart)
    assert outcome.completed is not bool(faults)
    said = re.search(r"down for ([\d.]+) s", outcome.message or str(outcome.error))
    assert said, outcome.error
    assert 88 < float(said[1]) < 110
