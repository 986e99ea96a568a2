"""A Prefect server of a measurement's own, with its own database, and a worker if need be."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from demo.processes import Processes
from pd_deploy.cli import one_server
from pd_deploy.cli.local_http import free_port, is_healthy

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 600  # the first start creates the database: minutes on a busy machine
ANSWER_TIMEOUT_S = 60
RETRY_DELAYS_S = (1, 2, 4, 8, 16)
BUSY = (429, 502, 503)  # 503 where SQLite is locked for too long
SERVER, WORKER = "server", "worker"


class PrefectServer:
    """A server while it is entered; it and its worker are ended at the end.

    Args:
        directory: for its database and logs.
        settings: environment variables for the server, and for all commands and runs.

    Attributes:
        home: Prefect's home.
        api: its URL.
        env: environment of a command that talks to it.
    """

    def __init__(self, directory: Path, settings: Mapping[str, str] | None = None) -> None:
        port = free_port()
        self.home = directory / "prefect"
        self.api = f"http://127.0.0.1:{port}/api"
        self.env = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.api,
            **one_server.SETTINGS,
            **(settings or {}),
        }
        self._processes = Processes(directory / "processes")
        self._command = [f"{BIN}/prefect", "server", "start", "--host", "127.0.0.1"]
        self._command += ["--port", str(port)]

    def __enter__(self) -> Self:
        try:
            self._processes.start(SERVER, self._command, self.env)
            self._processes.until(SERVER, lambda: is_healthy(self.api), START_TIMEOUT_S)
        except BaseException:
            self._processes.stop_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.stop_all()

    def start_worker(self, pool: str) -> None:
        """Create a pool, and start a process worker on it."""
        self.run("prefect", "work-pool", "create", pool, "--type", "process")
        worker = [f"{BIN}/prefect", "worker", "start", "--pool", pool]
        self._processes.start(WORKER, worker, self.env)

    def pid(self, name: str) -> int:
        """Return the process id of the server or the worker."""
        return self._processes.pid(name)

    def cpu_seconds(self, name: str) -> float:
        """Return the CPU time that the server or the worker has used, in s."""
        return self._processes.cpu_seconds(name)

    def run(self, *argv: str) -> str:
        """Run a command that talks to the server; return its standard output.

        Raises:
            RuntimeError: it failed; has what it printed.
        """
        done = subprocess.run(
            argv, env=self.env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"`{' '.join(argv)}` failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request to the server's API, as often as Prefect's client would; return what it
        answers.

        Raises:
            httpx.HTTPError: it refuses, or does not answer.
        """
        for delay in (*RETRY_DELAYS_S, None):
            try:
                answer = httpx.request(
                    method,
                    f"{self.api}/{path}",
                    json=body,
                    trust_env=False,
                    timeout=ANSWER_TIMEOUT_S,
                )
            except httpx.TransportError:
                if delay is None:
                    raise
            else:
                if answer.status_code not in BUSY or delay is None:
                    break
            time.sleep(delay)
        answer.raise_for_status()
        return answer.json() if answer.content else None
