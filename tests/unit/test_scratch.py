"""Directories for temporary files: closed, killed and living processes' ones."""

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pd_deploy.hosts import scratch
from pd_deploy.hosts.scratch import Scratch

KEEPS = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from pd_deploy.hosts.scratch import Scratch
kept = Scratch()
(kept.path / "engine.sock").touch()
print(kept.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch._remove_those_of_the_dead.cache_clear()
    return tmp_path


def test_a_closed_one_is_gone_and_may_be_closed_again(place: Path) -> None:
    made = Scratch()
    assert made.path.stat().st_mode & 0o777 == 0o700
    (made.path / "x").touch()
    made.close()
    made.close()
    assert not list(place.iterdir())


def test_what_a_killed_process_leaves_the_next_one_removes_and_nothing_else(place: Path) -> None:
    """Not those of processes that live, nor one that is just being made, nor what is not ours."""
    (place / "another").mkdir()
    (place / "another" / "x").touch()
    (place / f"{scratch.PREFIX}new").mkdir()
    before = set(place.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPS, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    kept = Path(process.stdout.readline().strip())
    try:
        Scratch().close()
        assert set(place.iterdir()) == {*before, kept}
    finally:
        process.kill()
        process.communicate()
    scratch._remove_those_of_the_dead.cache_clear()
    Scratch().close()
    assert set(place.iterdir()) == before


@pytest.mark.parametrize("length", [67, 68, 69, 107, 250])
def test_a_socket_fits_in_however_long_the_place_for_temporary_files_is_called(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    with tempfile.TemporaryDirectory(dir=scratch.SHORT) as short:
        long = Path(short, "x" * (length - len(short) - 1))
        long.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        made = Scratch("engine.sock")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(made.path / "engine.sock"))
        assert (made.path.parent == scratch.SHORT) is (len(str(long)) > 68)
        made.close()
