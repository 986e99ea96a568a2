"""The Prefect server that commands start on this machine where none is set up, and keep.

Starting it takes longer than a run that has nothing to do, so it stays for the next command, until
`pd-deploy server stop`. What it records is in Prefect's own database, in Prefect's home. It listens
on this machine only, and answers only to those who know the password in its record: this user.
"""

import fcntl
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import prefect
from prefect.settings import get_current_settings

from pd_deploy.cli.local_http import free_port, is_healthy
from pd_deploy.errors import PdDeployError
from pd_deploy.hosts.processes import machine, started

LOOK_EVERY_S = 0.1
STOP_TIMEOUT_S = 10.0
OURS_ALONE = 0o077  # as umask: for the database, too, which has the keys of blocks


@dataclass(frozen=True)
class LocalServer:
    """A server that a command has started.

    Attributes:
        machine: which machine, boot and namespace of pids it is on.
        started: when the process started, which tells it from a later one of that pid.
        password: what its requests have to bring, as `user:password`.
        prefect: the version of Prefect that it runs.
    """

    machine: str
    pid: int
    started: str
    port: int
    password: str
    prefect: str

    @property
    def api(self) -> str:
        """The URL of its API."""
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        now = started(self.pid)
        return bool(now) and self.machine == machine() and self.started == now


def ensure() -> tuple[LocalServer, bool]:
    """Return the server, and whether it had to be started; wait until it answers.

    Raises:
        PdDeployError: it does not start, does not answer, or is of another version of Prefect.
    """
    with _alone():
        server = _recorded()
        fresh = server is None
        if server is None:
            server = _start()
    if server.prefect != prefect.__version__:
        raise PdDeployError(
            f"the Prefect server that pd-deploy keeps on this machine is of Prefect "
            f"{server.prefect}, and this is {prefect.__version__}",
            hint="when no run is under way, end it: `pd-deploy server stop`; the next command "
            "starts another",
        )
    _await_answer(server)
    return server, fresh


def find() -> LocalServer | None:
    """Return the server, if there is one."""
    with _alone():
        return _recorded()


def stop() -> LocalServer | None:
    """End the server, by force if it takes longer than `STOP_TIMEOUT_S`; return it, if there was
    one."""
    with _alone():
        server = _recorded()
        if server:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if server.alive:
                    os.kill(server.pid, number)
                    _await_end(server)
        _record().unlink(missing_ok=True)
    return server


def _await_end(server: LocalServer) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while server.alive and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)


def log() -> Path:
    """Return the path of the server's log."""
    return _directory() / f"{_name()}.log"


def _directory() -> Path:
    return get_current_settings().home / "pd-deploy"


def _name() -> str:
    """Name the server by its machine: several may share a home."""
    return f"server-{os.uname().nodename}"


def _record() -> Path:
    return _directory() / f"{_name()}.json"


@contextmanager
def _alone() -> Iterator[None]:
    """Keep out other commands that want to start or stop the server."""
    try:
        _directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(_directory() / f"{_name()}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise PdDeployError(
            f"expected to write to Prefect's home, {get_current_settings().home}, for the Prefect "
            f"server of this machine; {error}",
            hint="set PREFECT_HOME to a directory of your own, or PREFECT_API_URL to a server",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _recorded() -> LocalServer | None:
    """Read which server was started last, if it is still alive."""
    try:
        server = LocalServer(**json.loads(_record().read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return server if server.alive else None


def _write(server: LocalServer) -> None:
    draft = _record().with_suffix(".new")
    with open(draft, "w", opener=_private) as written:
        json.dump(asdict(server), written)
    draft.replace(_record())


def _start() -> LocalServer:
    """Start a server, and record it."""
    port, password = free_port(), f"pd-deploy:{secrets.token_urlsafe(32)}"
    with open(log(), "wb", opener=_private) as said:
        process = subprocess.Popen(
            _command(port),
            env=os.environ
            | get_current_settings().to_environment_variables(exclude_unset=True)
            # As Prefect starts the servers that it ends with the command.
            | {
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
                "PREFECT_UI_ENABLED": "0",
                "PREFECT_SERVER_API_AUTH_STRING": password,
            },
            cwd=_directory(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # out of the reach of Ctrl-C
            umask=OURS_ALONE,
        )
    try:
        server = LocalServer(
            machine(), process.pid, started(process.pid), port, password, prefect.__version__
        )
        _write(server)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return server


def _command(port: int) -> list[str]:
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    options = ["--log-level", "error", "--lifespan", "on"]
    return [*uvicorn, "--host", "127.0.0.1", "--port", str(port), *options]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _await_answer(server: LocalServer) -> None:
    patience = get_current_settings().server.ephemeral.startup_timeout_seconds
    deadline = time.monotonic() + patience
    while not is_healthy(server.api):
        alive = server.alive
        if not alive or time.monotonic() > deadline:
            raise PdDeployError(
                "the Prefect server that pd-deploy starts on this machine "
                + (f"did not answer within {patience} s" if alive else "ended")
                + _last_error(),
                hint=f"read its log, {log()}; see that {get_current_settings().home} is "
                "writable and has room, and that no newer Prefect has used it; or run "
                "`prefect server start` and set PREFECT_API_URL",
            )
        time.sleep(LOOK_EVERY_S)


def _last_error() -> str:
    try:
        lines = log().read_text(errors="replace").split("\n")
    except OSError:
        return ""
    errors = [line.strip() for line in lines if re.match(r"\S*(Error|Exception)\b", line)]
    return f": {errors[-1][:300]}" if errors else ""
