"""`pd-deploy preflight` on hosts in memory: what it tells, and by which exit code."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import main
from pd_deploy.cli import preflight as cli
from pd_deploy.config.load import load_deployment
from pd_deploy.engines.device_report import DeviceReport
from pd_deploy.flows import preflight
from pd_deploy.hosts.machine import Machine
from pd_deploy.planning.flaws import Flaw, HostAnswers
from pd_deploy.planning.host_facts import facts_of
from pd_deploy.steps import inspecting
from pd_deploy.steps.full_preflight import Findings
from tests.memory.machine import Build
from tests.memory.world import FIRST, MODEL, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def flaws(
    world: World, *, full_hashes: bool = False, progress: list[str] | None = None
) -> Sequence[Flaw]:
    """What a preflight at a prompt finds; it changes no host."""
    return findings(world, full_hashes, progress if progress is not None else []).flaws


def findings(world: World, full_hashes: bool, progress: list[str]) -> Findings:
    """The same, with what hosts said."""

    async def look() -> Findings:
        async with open_session(load_deployment(world.path)) as session:
            return await preflight.find_flaws(session, None, "a look", full_hashes, progress.append)

    before = world.state()
    found = world.asked(look())
    assert world.state() == before
    return found


def test_sound_hosts_pass_before_a_first_deploy_and_while_they_serve(world: World) -> None:
    assert flaws(world) == []
    world.deploy()
    assert flaws(world) == []


def test_everything_is_told_at_once_errors_first(world: World) -> None:
    a, b = world.machines["a"], world.machines["b"]
    b.driver, b.clock_ahead = "25.2.0", 60
    b.health[1] = "Alarm"
    b.ports_down.add(2)
    b.hccn |= {
        (4, "ping"): "3 packets transmitted, 0 received, 100.00% packet loss\n",
        (5, "tls"): "dev_id:5, tls switch[1](0:disable, 1:enable)\n",
        (6, "ip"): "ipaddr:192.168.2.200\nnetmask:255.255.0.0\n",
        (7, "net_health"): "net health status: Fault\n",
        (8, "hccs_ping"): "This device does not support this function.\n",
    }
    b.disk.put(f"{MODEL}/model-00001.safetensors", b"WEIGHTS", 0o644)
    a.closed_to.add(b.address)
    a.held_ports[7000] = "nginx"
    world.cluster.push(FIRST, Build(world.cluster.registry[FIRST].digest, architecture="amd64"))
    found = flaws(world)
    assert [flaw.is_error for flaw in found] == sorted((f.is_error for f in found), reverse=True)
    where = {(flaw.check, flaw.host, flaw.is_error) for flaw in found}
    at_a, at_b = "a (10.0.0.1)", "b (10.0.0.2)"
    assert where == {
        ("device-health", at_b, True),
        ("device-link", at_b, True),
        ("device-ping", at_b, True),
        ("device-tls", at_b, True),
        ("image-architecture", at_a, True),
        ("image-architecture", at_b, True),
        ("model-files", at_b, True),
        ("ports-reachable", at_b, True),
        ("host", at_a, True),
        ("clock", at_b, False),
        ("device-addresses", at_b, False),
        ("device-network", at_b, False),
        ("device-ping", at_b, False),
        ("driver-version", at_b, False),
    }
    assert all(flaw.hint for flaw in found)
    outcome = world.run(preflight.preflight)
    assert "steps failed" in str(outcome.error)
    assert "npu-smi says Alarm" in str(outcome.error)


def test_a_host_that_is_away_is_told_and_the_others_are_checked(world: World) -> None:
    world.machines["a"].clock_ahead = 60
    world.machines["a"].hccn[3, "net_health"] = "net health status: Fault\n"
    world.machines["b"].unplug()
    away, fault = flaws(world)
    assert (away.check, away.host, away.is_error) == ("host", "b (10.0.0.2)", True)
    assert (fault.check, fault.host) == ("device-network", "a (10.0.0.1)")


def test_clocks_are_told_against_the_controllers(world: World) -> None:
    world.machines["b"].clock_ahead = 60
    said = {
        answers.name: facts_of(answers)["clock"] for answers in findings(world, False, []).answers
    }
    assert re.fullmatch(r"[+-][01]\.\d s from here", said["a"])
    assert re.fullmatch(r"\+(59|60|61)\.\d s from here", said["b"])


def test_slow_tools_make_no_clock_less_certain(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = world.cluster.clock.date().timestamp()
    for machine in world.machines.values():
        machine.captured["date +%s.%N"] = f"{begin + 40.25}\n"
        machine.captured["date -u +%s.%N"] = f"{begin + 59.5}\n"

    async def inspect() -> HostAnswers:
        dates = iter((begin, begin + 20))  # before and after 20 s of tools
        with monkeypatch.context() as patched:
            patched.setattr(inspecting, "now", lambda: next(dates))
            async with open_session(load_deployment(world.path)) as session:
                return await inspecting.inspect(session, "a")

    clock = world.asked(inspect()).clock
    assert clock == pytest.approx((39.5, 40.25), abs=0.001)


def test_weights_are_read_whole_on_request(world: World) -> None:
    progress: list[str] = []
    assert flaws(world, full_hashes=True, progress=progress) == []
    assert sorted(progress) == [
        f"{where}: 3 of 3 files, 100 %" for where in ("a (10.0.0.1)", "b (10.0.0.2)")
    ]


def test_as_a_flow_warnings_complete(world: World) -> None:
    assert world.run(preflight.preflight).message == "no problems on 2 hosts"
    world.machines["b"].driver = "25.2.0"
    assert world.run(preflight.preflight).message == "1 warning, no errors on 2 hosts"


ANSWERS = HostAnswers(
    "a",
    "a (10.0.0.1)",
    Machine(mtu=1500),
    DeviceReport(driver="24.1.rc2"),
    clock=(0.1, 0.3),
)
FLAWS = [
    Flaw("device-tls", "b (10.0.0.2)", "expected 0, found 1", "switch it"),
    Flaw("clock", "a (10.0.0.1)", "expected\nthe same", "start it", is_error=False),
]


def test_the_table_counts_and_the_exit_code_says_whether_there_are_errors(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, file = CliRunner(), str(world.path)
    for found, code, counted in (
        (FLAWS, 1, "1 error, 1 warning (1 of 2 hosts answered)"),
        (FLAWS[1:], 0, "1 warning (1 of 2 hosts answered)"),
        ([], 0, "no problems (1 of 2 hosts answered)"),
    ):
        monkeypatch.setattr(cli, "run", lambda *_, found=found, **__: Findings(found, [ANSWERS]))
        done = runner.invoke(main.app, ["preflight", file])
        assert done.exit_code == code, done.output
        assert done.output.splitlines()[-1] == f"qwq-3p1d: {counted}"
    assert cli.as_text(
        load_deployment(world.path), Findings(FLAWS, [ANSWERS]), ""
    ).splitlines() == [
        "host          found",
        "a (10.0.0.1)  driver 24.1.rc2; MTU 1500; clock +0.2 s from here",
        "",
        "         check       host          problem → what to do",
        "error    device-tls  b (10.0.0.2)  expected 0, found 1 → switch it",
        "warning  clock       a (10.0.0.1)  expected the same → start it",
        "",
        "qwq-3p1d: 1 error, 1 warning ()",
    ]
    monkeypatch.setattr(cli, "run", lambda *_, **__: Findings(FLAWS, [ANSWERS]))
    done = runner.invoke(main.app, ["preflight", file, "--json"])
    document = json.loads(done.output)
    assert [p["check"] for p in document["problems"]] == ["device-tls", "clock"]
    assert document["hosts"]["a"]["driver"] == "24.1.rc2"


def test_what_needs_no_host_is_checked_without_one(world: World) -> None:
    runner = CliRunner()
    done = runner.invoke(main.app, ["preflight", str(world.path), "--offline"])
    assert (done.exit_code, done.output) == (0, "qwq-3p1d: no problems (without asking hosts)\n")
    world.change(ports={"zmq": 36000}, image="file:/no/such.tar")
    done = runner.invoke(main.app, ["preflight", str(world.path), "--offline"])
    assert done.exit_code == 1
    assert "36000" in done.output
    assert "/no/such.tar" in done.output
