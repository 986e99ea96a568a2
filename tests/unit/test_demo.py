"""The demo: what a start that fails takes down again."""

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
