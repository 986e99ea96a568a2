"""Commands that look at hosts, while one hangs: its SSH server lets one in, and its Docker engine,
or its disk, never answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer import main as typer
from typer.testing import CliRunner

from pd_deploy.cli import main
from tests.memory.calls import Way
from tests.memory.world import World

FILE = "FILE"
ENGINE, DISK = ("docker",), ("docker", "session", "sftp")
UNTIL_S = 30  # `gates.connect`, and 20 s
SLACK_S = 5
SAID = f"host b (10.0.0.2): it did not say within {UNTIL_S} s what is on it"
ROW = f"no answer from {SAID}"

# By command: its exit code and what it shows of the other host, with an engine that hangs, and
# with a disk. Of what none is shown, it can't be told without all hosts.
LOOKS = {
    f"plan {FILE}": ((7, "== host a", ROW), (7, "== host a", ROW)),
    f"diff {FILE}": ((7, "qwq-3p1d: ", ROW), (7, "qwq-3p1d: ", ROW)),
    f"status {FILE}": ((4, "p0        prefill  a     0-7", ROW), (4, "p0        prefill  a", ROW)),
    f"releases {FILE}": ((0, "20250722_26", ROW), (0, "20250722_26", ROW)),
    f"history {FILE}": ((0, "20250722_26", ROW), (0, "20250722_26", ROW)),
    f"logs {FILE}": ((1, "copied to", ROW), (1, "copied to", ROW)),
    f"exec {FILE} p0 -- sh -c true": ((0, "", ""), (0, "", "")),
    f"exec {FILE} d0 -- sh -c true": ((1, "host a (10.0.0.1): answers", SAID),) * 2,
    f"fleet status {FILE}": ((4, "20250722_26", ROW), (4, "20250722_26", ROW)),
    f"lock status {FILE}": ((0, "a (10.0.0.1): free", ""), (0, "a (10.0.0.1): free", ROW)),
    f"metrics {FILE} --serving": ((0, '"p0"', ""), (0, '"p0"', ROW)),
    f"bench {FILE}": ((0, "20 of 20", ""), (0, "20 of 20", "")),
    f"preflight {FILE}": ((1, "1 error", SAID.partition(": ")[2]),) * 2,
    f"capture {FILE}": ((0, "capture-a.json", ""), (1, "capture-a.json", ROW)),
    f"tags {FILE}": ((0, "would be taken", ""), (1, "host a (10.0.0.1): answers", SAID)),
    f"image {FILE}": ((1, "", SAID), (1, "host a (10.0.0.1): answers", SAID)),
    f"adopt {FILE}": ((1, "", SAID), (1, "host a (10.0.0.1): answers", SAID)),
}
# These ask no host, or change something: a run waits for longer, and needs all hosts.
OTHERS = {
    "init", "import-ansible", "check", "config", "follow", "notify", "server", "credentials",
    "deploy", "rollback", "recover", "prune", "teardown", "lab", "lock hold", "lock release",
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path)
    world.deploy()
    world.change(gates={"benchmark": {"requests": 20}})
    monkeypatch.setattr(asyncio, "run", world.asked)
    return world


@pytest.mark.parametrize("number", [0, 1], ids=["engine", "disk"])
@pytest.mark.parametrize("command", LOOKS)
def test_a_host_that_hangs_keeps_nobody_waiting_for_long_and_is_told_beside_the_others(
    world: World, command: str, number: int
) -> None:
    code, shown, told = LOOKS[command][number]
    hanging: tuple[Way, ...] = (ENGINE, DISK)[number]
    world.machines["b"].hanging = hanging
    before = world.cluster.clock.seconds()
    words = [str(world.path) if word == FILE else word for word in command.split()]
    ended = CliRunner().invoke(main.app, words)
    said = f"{ended.output}{ended.exception}"  # an error is printed by whoever calls the app
    assert ended.exit_code == code, said
    assert shown in said
    assert told in said
    assert world.cluster.clock.seconds() - before < UNTIL_S + SLACK_S


def test_each_command_is_tried_or_asks_no_host_or_changes_something() -> None:
    top = typer.get_command(main.app).commands  # type: ignore[attr-defined]
    names = set(top) - {"fleet", "lock"}
    names |= {f"{group} {name}" for group in ("fleet", "lock") for name in top[group].commands}
    tried = {command.partition(f" {FILE}")[0] for command in LOOKS}
    assert names == tried | OTHERS
