"""The demo: what a start that fails takes down again."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo import __main__ as demo
from demo.processes import Processes


@pytest.mark.parametrize("had_lab", [True, False])
def test_a_start_that_fails_takes_down_no_lab_that_was_up_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had_lab: bool
) -> None:
    commands = []

    def run(*argv: str, quiet: bool = False) -> str:
        commands.append(argv)
        if argv == ("pd-deploy", "lab", "up"):
            (tmp_path / "lab").mkdir(exist_ok=True)
            (tmp_path / "lab/lab.json").touch()
            raise RuntimeError("no room")
        return ""

    if had_lab:
        (tmp_path / "lab").mkdir()
        (tmp_path / "lab/lab.json").touch()
    monkeypatch.setattr(demo, "LAB", tmp_path / "lab")
    monkeypatch.setattr(demo, "HOME", tmp_path / "demo")
    monkeypatch.setattr(demo, "processes", Processes(tmp_path / "demo"))
    monkeypatch.setattr(Processes, "start", lambda *_: None)
    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo", "up"])
    assert demo.main() == 1
    assert (("pd-deploy", "lab", "down") in commands) is not had_lab


def test_what_to_type_next_works_as_it_is_printed() -> None:
    """In a shell without any environment but the one that is printed."""
    text = demo.next_commands(demo.ROOT / "deployments/lab-qwq-3p1d.yaml")
    export = next(line.strip() for line in text.splitlines() if "export PATH" in line)
    assert f"PREFECT_API_URL={demo.API}" in export
    commands = [line.split("#")[0].strip() for line in text.splitlines() if "pd-deploy " in line]
    assert [command.split()[1] for command in commands] == [
        "status", "releases", "diff", "deploy", "lab", "deploy", "rollback", "lab", "recover",
    ]  # fmt: skip
    script = "\n".join(["set -e", export, *(f"{command} --help" for command in commands)])
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        cwd=demo.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file = commands[0].split()[2]
    assert (demo.ROOT / file).is_file()
