"""`pd-deploy logs` on hosts in memory: what a host says does not lead out of the directory here."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pd_deploy.cli import execute, logs
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import ContainerMissing, FactsError, InvalidInput, PdDeployError
from pd_deploy.hosts import host as hosts
from pd_deploy.hosts.facts import Facts
from pd_deploy.hosts.host import PART_BYTES, Host
from pd_deploy.records import generations
from pd_deploy.steps.logs import local_path
from tests.memory.world import NAME, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.deploy()
    return world


def log_directory(world: World) -> str:
    return f"/data/log_path/{NAME}/{world.serving()}"


def collected(world: World, to: Path) -> set[str]:
    """The files that came, by their paths below the directory."""
    world.asked(logs._collect(load_deployment(world.path), None, to))
    return {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}


def test_each_hosts_files_are_copied_whole(world: World, tmp_path: Path) -> None:
    large = b"0123456789abcdef" * (PART_BYTES // 16 + 1)
    world.machines["a"].disk.put(f"{log_directory(world)}/p0/server_0.log", large)
    files = collected(world, tmp_path / "logs")
    printed = {f"{host}/docker.log" for host in ("a/p0", "a/p1", "a/c0", "b/p2", "b/d0")}
    assert files == printed | {"a/p0/server_0.log"}
    assert (tmp_path / "logs/a/p0/server_0.log").read_bytes() == large
    assert "starting prefill p0" in (tmp_path / "logs/a/p0/docker.log").read_text()


def test_a_host_that_is_away_is_told_and_the_others_logs_come(world: World, tmp_path: Path) -> None:
    world.machines["b"].unplug()
    _, away = world.asked(logs._collect(load_deployment(world.path), None, tmp_path / "logs"))
    assert [why.partition(": ")[0] for why in away] == ["no answer from host b (10.0.0.2)"]
    hosts = {path.name for path in (tmp_path / "logs").iterdir()}
    assert hosts == {"a"}


@pytest.mark.parametrize("path", ["/etc/cron.d/x", "{0}/../../x", "{0}//etc/x", "{0}/p0/./x"])
def test_no_file_of_a_host_leads_out_of_the_directory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Its `find` may print what it likes."""
    named = path.format(log_directory(world))

    async def find_files(_: Host, __: str) -> list[str]:
        return [named]

    monkeypatch.setattr(Host, "find_files", find_files)
    with pytest.raises(FactsError) as caught:
        collected(world, tmp_path / "in/logs")
    assert "expected a name for a file or directory of logs, found " in str(caught.value)
    assert {p.name for p in (tmp_path / "in").rglob("*") if p.is_file()} <= {"docker.log"}
    assert {p.name for p in tmp_path.iterdir()} == {"in", "qwq-3p1d.yaml"}


@pytest.mark.parametrize("instance", ["../x", "/etc/x", "..", ".", "", "a/../../x", "x\0"])
def test_no_label_of_a_container_leads_out_of_the_directory(
    world: World, tmp_path: Path, instance: str
) -> None:
    container = next(world.machines["a"].running())
    container.config["Labels"][generations.INSTANCE] = instance
    with pytest.raises(FactsError, match="expected a name for a file or directory of logs"):
        collected(world, tmp_path / "in/logs")
    assert {p.name for p in tmp_path.iterdir()} <= {"in", "qwq-3p1d.yaml"}


def test_no_name_of_a_former_host_leads_out_of_the_directory(tmp_path: Path) -> None:
    host: Any = SimpleNamespace(where="x")
    for name in ("../x", "/x", ".."):
        with pytest.raises(FactsError):
            local_path(host, tmp_path, name)


@pytest.mark.parametrize("taken", ["a", "a/p0/server_0.log/x", "a/p0/docker.log/x"])
def test_what_cannot_be_written_here_is_told_without_a_traceback(
    world: World, tmp_path: Path, taken: str
) -> None:
    world.machines["a"].disk.put(f"{log_directory(world)}/p0/server_0.log", b"x")
    (tmp_path / "logs" / taken).parent.mkdir(parents=True)
    (tmp_path / "logs" / taken).touch()
    with pytest.raises(PdDeployError, match=r"can't write .*with `--to`"):
        collected(world, tmp_path / "logs")


def test_a_file_that_is_gone_once_it_is_read_keeps_none_of_the_others(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As logs do that are rotated; so it is for one whose name can't be read."""
    directory = log_directory(world)
    world.machines["a"].disk.put(f"{directory}/p0/server_0.log", b"here\n")
    gone = f"{directory}/p0/a.log"

    async def find_files(_: Host, directory: str) -> list[str]:
        return [gone, f"{directory}/p0/server_0.log"]

    async def sizes(_: Facts, directory: str) -> dict[str, int]:
        return {gone: 7, f"{directory}/p0/server_0.log": 5}

    monkeypatch.setattr(Host, "find_files", find_files)
    monkeypatch.setattr(Facts, "sizes", sizes)
    world.asked(logs._collect(load_deployment(world.path), None, tmp_path / "logs", ["p0"]))
    logs_of_p0 = {path.name for path in (tmp_path / "logs/a/p0").iterdir()}
    assert logs_of_p0 == {"docker.log", "server_0.log"}
    lines = world.asked(follow(world, ["p0"], []))
    assert "p0/server_0.log | here" in lines


def test_a_large_file_that_is_followed_comes_in_parts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "PART_BYTES", 8)
    monkeypatch.setattr(logs.logs, "MOST_AT_ONCE", 16)
    path = f"{log_directory(world)}/p1/server_0.log"
    content = [f"line {n}" for n in range(8)] + ["long " * 8, "last"]

    def put() -> None:
        world.machines["a"].disk.put(path, "\n".join([*content, ""]).encode())

    lines = world.asked(follow(world, ["p1"], [put, *[lambda: None] * 3]))
    shown = [line.partition(" | ")[2] for line in lines if line.startswith("p1/server_0.log")]
    assert shown[:8] == content[:8]
    assert "".join(shown[8:]) == "".join(content[8:])


def test_only_the_logs_of_an_instance_come_if_it_is_named(world: World, tmp_path: Path) -> None:
    for name in ("p0", "p1"):
        world.machines["a"].disk.put(f"{log_directory(world)}/{name}/server_0.log", b"x")
    deployment = load_deployment(world.path)
    world.asked(logs._collect(deployment, None, tmp_path / "logs", ["p1"]))
    files = (tmp_path / "logs").rglob("*.log")
    copied = {str(path.relative_to(tmp_path / "logs")) for path in files}
    assert copied == {"a/p1/docker.log", "a/p1/server_0.log"}
    with pytest.raises(InvalidInput, match="expected one of p0, p1, p2, d0, c0; found 'p9'"):
        world.asked(logs._collect(deployment, None, tmp_path / "logs", ["p9"]))


async def follow(
    world: World, instances: Sequence[str], between: Sequence[Callable[[], object]]
) -> list[str]:
    """What is printed, if these things happen one after the other, a second apart and more."""
    lines: list[str] = []
    original = logs.typer.echo
    logs.typer.echo = lambda line, **_: lines.append(str(line))  # type: ignore[assignment]
    following = asyncio.ensure_future(logs.followed(load_deployment(world.path), None, instances))
    try:
        for happens in between:
            await asyncio.sleep(2.5)
            happens()
        await asyncio.sleep(2.5)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        logs.typer.echo = original
    return lines


def test_what_comes_is_printed_line_by_line_and_once(world: World) -> None:
    a, path = world.machines["a"], f"{log_directory(world)}/p1/server_0.log"
    p1 = world.running()["p1"]
    a.disk.put(path, b"old\n" * 1000)

    def grows(content: bytes) -> Callable[[], None]:
        return lambda: a.disk.put(path, a.disk.read(path).encode() + content)

    lines = world.asked(
        follow(
            world,
            ["p1"],
            [
                grows(b"first\nsec"),
                grows(b"ond\n"),
                lambda: a.say(p1, "said"),
                lambda: a.disk.put(path, b"anew\n"),
                lambda: a.disk.put(f"{log_directory(world)}/p1/server_1.log", b"other\n"),
            ],
        )
    )
    assert {line.partition(" | ")[0] for line in lines} == {
        "p1", "p1/server_0.log", "p1/server_1.log",
    }  # fmt: skip
    assert 0 < lines.count("p1/server_0.log | old") <= 500
    assert [line for line in lines if not line.endswith(" | old")][-5:] == [
        "p1/server_0.log | first",
        "p1/server_0.log | second",
        "p1 | said",
        "p1/server_0.log | anew",
        "p1/server_1.log | other",
    ]
    assert any("starting prefill p1" in line for line in lines)


def test_a_host_that_goes_and_comes_back_is_followed_on(world: World) -> None:
    a, p1 = world.machines["a"], world.running()["p1"]
    lines = world.asked(
        follow(
            world,
            [],
            [
                lambda: a.unplug(60),
                lambda: a.say(p1, "meanwhile"),
                *[lambda: None] * 40,
            ],
        )
    )
    assert lines.count("p1 | meanwhile") == 1
    assert any(line.startswith("a | host a (10.0.0.1): ") for line in lines)


def test_a_command_runs_in_the_container_of_an_instance(world: World) -> None:
    printed: list[tuple[bytes, bytes]] = []
    deployment = load_deployment(world.path)

    def run(instance: str) -> int:
        def write(out: bytes, err: bytes) -> None:
            printed.append((out, err))

        command = ["sh", "-c", "echo here; echo there >&2; exit 3"]
        return world.asked(execute.executed(deployment, instance, command, write))

    assert run("d0") == 3
    assert printed == [(b"here\n", b""), (b"", b"there\n")]
    with pytest.raises(InvalidInput):
        run("d9")
    world.machines["b"].end(world.running()["d0"], 1)
    with pytest.raises(ContainerMissing, match="expected a running container of d0"):
        run("d0")
