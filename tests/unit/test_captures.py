"""Captures: what is taken out of them, and that they replay."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import capture as cli
from pd_deploy.cli import main
from pd_deploy.config.load import load_deployment
from pd_deploy.engines import ascend
from pd_deploy.hosts import machine
from pd_deploy.hosts.redaction import Redaction
from pd_deploy.planning import flaws
from pd_deploy.planning.flaws import HostAnswers
from pd_deploy.steps import capturing, full_preflight
from pd_deploy.steps.session import Session
from tests import captures
from tests.captures import Capture
from tests.memory.world import World
from tests.unit.example import ROOT

T = TypeVar("T")
TOOLS = ROOT / "lab/standin/host/usr"


@pytest.mark.parametrize("capture", captures.kept(), ids=lambda capture: capture.name)
def test_every_capture_is_understood_and_of_a_sound_host(capture: Capture) -> None:
    """One that a real host gave, and that is not, shows what a parser has to learn."""
    report = ascend.parse(capture.printed, capture.devices, full=True)
    said = machine.parse(capture.printed, capture.address)
    assert (report.unread, said.unread) == ((), ())
    assert report.driver == report.installed_driver
    assert report.firmware
    assert report.has_super_node == capture.name.startswith("a3")
    host = HostAnswers(capture.name, capture.name, said, report)
    assert flaws.of_host(host, ascend, capture.devices) == []
    assert flaws.gateways([host]) == []


@pytest.mark.parametrize("capture", captures.kept(), ids=lambda capture: capture.name)
def test_the_labs_tools_print_what_a_capture_has(capture: Capture, tmp_path: Path) -> None:
    (tmp_path / "data/standin").mkdir(parents=True)
    content = (captures.DIRECTORY / f"{capture.name}.json").read_text()
    (tmp_path / "data/standin/capture.json").write_text(content)
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    (tmp_path / "usr/local/bin/npu-smi").symlink_to(TOOLS / "local/bin/npu-smi")
    environment = os.environ | {"STANDIN_ROOT": str(tmp_path)}

    def told(*argv: str | Path) -> str:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        return done.stdout

    assert (
        told(sys.executable, TOOLS / "local/bin/npu-smi", "info") == capture.texts["npu-smi info"]
    )
    query = ascend.query(capture.devices[-1], "tls")
    assert told("sh", TOOLS / "bin/hccn_tool", *query[1:]) == capture.texts[" ".join(query)]


def test_a_capture_of_a_host_in_memory_makes_another_host_the_same(tmp_path: Path) -> None:
    world = World(tmp_path)
    b = world.machines["b"]
    b.health[1], b.driver = "Alarm", "25.2.0"

    def asked(call: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        async def ask() -> T:
            async with open_session(load_deployment(world.path)) as session:
                return await call(session)

        return world.asked(ask())

    document = asked(lambda session: capturing.capture(session, "b"))
    (tmp_path / "b.json").write_text(json.dumps(document))
    replayed = captures.load(tmp_path / "b.json")
    assert replayed.devices == list(range(16))
    b.health.clear()
    b.driver = "24.1.rc3.5"
    sound = asked(lambda session: full_preflight.inspect_host(session, "b"))
    assert sound.flaws == ()
    b.captured = replayed.texts
    sick = asked(lambda session: full_preflight.inspect_host(session, "b"))
    assert [flaw.message for flaw in sick.flaws] == [
        "expected device 1 to be healthy, found that npu-smi says Alarm"
    ]
    assert sick.answers
    assert sick.answers.devices
    assert sick.answers.devices.driver == "25.2.0"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("        Serial Number                  : 033EXY10N8000275\n", "REDACTED"),
        (" ID: 0b7e5b1e-5a38-4c29-9d6c-0d9fbf7b8a5d\n", " ID: REDACTED\n"),
        ("        VDie ID : B8E2 3A4F\n", "        VDie ID : REDACTED\n"),
        (" HTTP Proxy: http://me:word@10.0.0.9:3128\n", "http://REDACTED@10.0.0.9:3128"),
        ("HF_TOKEN=hf_abc other=1\n", "HF_TOKEN=REDACTED other=1\n"),
        ('"registry_password": "x y"\n', '"registry_password": REDACTED\n'),
        ("subject[/C=CN/O=Acme] issuer[/O=HUAWEI]\n", "subject[REDACTED] issuer[/O=HUAWEI]\n"),
        ("link/ether 3c:c7:86:1a:2b:3c brd ff:ff:ff:ff:ff:ff\n", "02:00:00:00:00:01 brd ff:ff"),
        ("inet 8.8.8.8/24 and 8.8.8.8\n", "inet 198.51.100.1/24 and 198.51.100.1\n"),
        ("inet6 2a01:4f8::1/64 fe80::1\n", "inet6 2001:db8::1/64 fe80::1\n"),
        (" Name: node-7\n", " Name: a\n"),
    ],
)
def test_what_is_nobodys_business_is_taken_out(text: str, redacted: str) -> None:
    assert redacted in Redaction({"node-7": "a"})(text)


@pytest.mark.parametrize(
    "text",
    [
        "ipaddr:192.168.11.103\nnetmask:255.255.255.0\n",
        "| 0                 | 0000:C1:00.0  | 0           0    / 0          3407 / 65536 |\n",
        "Version=7.5.0.5\nFirmware Version               : 6.2.1.0\n",
        'LISTEN 0 128 [::]:22 [::]:* users:(("sshd",pid=1,fd=3))\n',
        "12:30:45 10.0.0.1:9000 node-71\n",
    ],
)
def test_what_parsers_need_stays(text: str) -> None:
    assert Redaction({"node-7": "a"})(text) == text


def test_public_addresses_stay_if_asked() -> None:
    assert Redaction({}, keep_addresses=True)("inet 8.8.8.8\n") == "inet 8.8.8.8\n"


def test_the_command_names_its_files_and_hosts_that_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.machines["b"].unplug()
    monkeypatch.setattr(cli.asyncio, "run", world.asked)
    arguments = ["capture", str(world.path), "--to", str(tmp_path / "new")]
    done = CliRunner().invoke(main.app, arguments)
    assert done.exit_code == 1
    assert f"wrote {tmp_path}/new/capture-a.json" in done.output
    assert "no answer from host b (10.0.0.2)" in done.output
    assert not (tmp_path / "new/capture-b.json").exists()
    assert captures.load(tmp_path / "new/capture-a.json").devices
