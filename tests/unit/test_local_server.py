"""The Prefect server that commands start where none is set up: a small program in its place."""

import contextvars
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.context import refresh_global_settings_context
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)
from typer.testing import CliRunner

from pd_deploy.cli import local_server, prefect_api
from pd_deploy.cli.main import app
from pd_deploy.errors import PdDeployError

ANSWERS = """
import http.server, os, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["PREFECT_SERVER_API_AUTH_STRING"].encode())
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""
Runs = Callable[[str], None]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Prefect's home, without a server set up; the server that is started there is ended."""
    settings = {PREFECT_HOME: tmp_path, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120}
    with temporary_settings(settings, restore_defaults={PREFECT_API_URL}):
        yield tmp_path
        local_server.stop()


@pytest.fixture
def runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Has another program started in the server's place."""

    def run(program: str) -> None:
        monkeypatch.setattr(
            local_server, "_command", lambda port: [sys.executable, "-c", program, str(port)]
        )

    run(ANSWERS)
    return run


@pytest.mark.usefixtures("runs")
def test_it_is_started_once_kept_and_stopped() -> None:
    server, fresh = local_server.ensure()
    assert fresh
    assert local_server.ensure() == (server, False)
    assert local_server.find() == server
    assert os.getsid(server.pid) == server.pid, "Ctrl-C would end it"
    assert local_server.stop() == server
    assert not server.alive
    assert local_server.find() is local_server.stop() is None
    other, fresh = local_server.ensure()
    assert fresh
    assert other.password != server.password


@pytest.mark.usefixtures("runs")
def test_commands_that_start_at_once_share_it() -> None:
    commands = [contextvars.copy_context() for _ in range(6)]
    with ThreadPoolExecutor(len(commands)) as pool:
        results = list(pool.map(lambda command: command.run(local_server.ensure), commands))
    assert len({server for server, _ in results}) == 1
    assert [fresh for _, fresh in results].count(True) == 1


@pytest.mark.usefixtures("runs")
def test_one_that_died_is_replaced() -> None:
    dead, _ = local_server.ensure()
    os.kill(dead.pid, signal.SIGKILL)
    local_server._await_end(dead)
    server, fresh = local_server.ensure()
    assert fresh
    assert server.alive
    assert not dead.alive


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    "other",
    [{"started": "1"}, {"started": ""}, {"machine": "elsewhere"}],
    ids=["a later process", "a process that ended at once", "another machine"],
)
def test_a_process_that_only_has_its_pid_is_left_alone(other: dict[str, str]) -> None:
    server, _ = local_server.ensure()
    local_server._write(replace(server, **other))
    try:
        assert local_server.stop() is None
        second, fresh = local_server.ensure()
        assert fresh
        assert second.pid != server.pid
        assert server.alive
    finally:
        os.kill(server.pid, signal.SIGTERM)


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("record", ["", "{", "[]", '{"pid": 1}'])
def test_a_record_that_was_cut_off_is_replaced(record: str) -> None:
    local_server.find()
    local_server._record().write_text(record)
    assert local_server.stop() is None
    local_server._record().write_text(record)
    server, fresh = local_server.ensure()
    assert fresh
    assert local_server.find() == server


@pytest.mark.usefixtures("runs")
def test_nobody_else_can_read_its_password_or_what_it_writes(home: Path) -> None:
    former = os.umask(0)
    try:
        server, _ = local_server.ensure()
    finally:
        os.umask(former)
    assert httpx.get(f"{server.api}/x", trust_env=False).text == server.password
    assert server.password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    written = [path for path in (home / "pd-deploy").rglob("*") if path.is_file()]
    assert len(written) == 3
    for path in (home / "pd-deploy", *written):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    umask = [
        line
        for line in Path(f"/proc/{server.pid}/status").read_text().split("\n")
        if "Umask" in line
    ]
    assert umask == ["Umask:\t0077"]


def test_one_that_ends_is_told_at_once(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    """With its reason, and without its traceback."""
    runs("raise OSError('no room')")
    with (
        pytest.raises(PdDeployError, match=r"ended: OSError: no room → read its log, .* is writ"),
        prefect_api.served(),
    ):
        pytest.fail("there is no server")
    assert capfd.readouterr().err == ""


def test_one_of_another_version_of_prefect_is_told(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_server.ensure()
    monkeypatch.setattr(local_server.prefect, "__version__", "99")
    with pytest.raises(PdDeployError, match=r"and this is 99 → .*`pd-deploy server stop`"):
        local_server.ensure()


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        temporary_settings({PREFECT_HOME: tmp_path / "file"}),
        pytest.raises(PdDeployError, match=r"expected to write to Prefect's home, .*/file"),
    ):
        local_server.ensure()


@pytest.mark.usefixtures("runs")
def test_commands_use_it_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_UI_URL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    try:
        for _ in range(2):
            with prefect_api.served():
                pass
        server = local_server.find()
        assert server
        settings: Any = contextvars.Context().run(get_current_settings)
        assert settings.api.url == server.api
        assert settings.api.auth_string.get_secret_value() == server.password
    finally:
        monkeypatch.undo()
        refresh_global_settings_context()
    assert capsys.readouterr().err.count("`pd-deploy server stop` ends it") == 1


@pytest.mark.usefixtures("runs")
def test_it_is_shown_and_stopped_by_command() -> None:
    def said(verb: str) -> str:
        return CliRunner().invoke(app, ["server", verb]).output

    assert "not running" in said("status")
    server, _ = local_server.ensure()
    assert f"pid {server.pid}, {server.api}" in said("status")
    assert server.password not in said("status")
    assert said("stop") == f"stopped pid {server.pid}\n"
    assert said("stop") == "not running\n"


def test_one_that_does_not_end_is_killed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "STOP_TIMEOUT_S", 0.5)
    runs("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ANSWERS)
    server, _ = local_server.ensure()
    assert local_server.stop() == server
    assert not server.alive
