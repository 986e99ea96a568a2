"""Background processes that outlive the command that started them, and are recorded in a file."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pd_deploy.hosts.processes import started

STOP_TIMEOUT_S = 20  # a worker ends its flow run first
POLL_S = 0.1


class Processes:
    """Processes of the demo, recorded by pid and start time so that no other is ever ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._record = directory / "processes.json"

    def running(self, name: str) -> bool:
        """Tell whether the process of that name is alive."""
        pid, recorded = self._read().get(name, (0, ""))
        return bool(pid) and started(pid) == recorded

    def pid(self, name: str) -> int:
        """Return the process id of the process of that name; 0 if there was none."""
        return self._read().get(name, (0, ""))[0]

    def start(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        """Start a process in a session of its own, with a log file of its name."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._write(self._read() | {name: (process.pid, started(process.pid))})

    def cpu_seconds(self, name: str) -> float:
        """Return the CPU time that a process and those it has started have used, in s."""
        group = self.pid(name)
        # utime, stime, and those of children that have ended
        ticks = [sum(map(int, f[11:15])) for f in _all_processes() if int(f[2]) == group]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    def stop_all(self) -> list[str]:
        """End all of them, each with its children; return the names of those that were alive."""
        alive = [name for name in self._read() if self.running(name)]
        for name in reversed(alive):
            self.stop(name)
        self._record.unlink(missing_ok=True)
        return alive

    def until(self, name: str, condition: Callable[[], bool], timeout: float) -> None:
        """Wait for a condition while a process is alive.

        Raises:
            RuntimeError: the process ended, or the wait timed out; has the last lines of its log.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running(name):
                raise RuntimeError(f"{name} ended:\n{self.tail(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} not ready in {timeout:g} s:\n{self.tail(name)}")
            time.sleep(POLL_S)

    def stop(self, name: str) -> None:
        """End a process with its children, at first by SIGTERM."""
        group = self._read()[name][0]
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _group_lives(group) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if _group_lives(group):
            os.killpg(group, signal.SIGKILL)

    def kill(self, name: str, *, children: bool = True) -> None:
        """Kill a process and wait until it is gone.

        Args:
            children: kill those as well, as where a machine dies.
        """
        pid = self._read()[name][0]
        if children:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
        while _group_lives(pid) if children else started(pid):
            time.sleep(POLL_S)

    def tail(self, name: str, count: int = 15) -> str:
        """Return the last lines of the log of the process of that name."""
        lines = (self._directory / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in lines[-count:])

    def _read(self) -> dict[str, tuple[int, str]]:
        try:
            return {k: (v[0], v[1]) for k, v in json.loads(self._record.read_text()).items()}
        except (OSError, ValueError):
            return {}

    def _write(self, record: Mapping[str, tuple[int, str]]) -> None:
        draft = self._record.with_suffix(".new")
        draft.write_text(json.dumps(record))
        draft.replace(self._record)


def _group_lives(group: int) -> bool:
    return any(int(fields[2]) == group and fields[0] != "Z" for fields in _all_processes())


def _all_processes() -> Iterator[list[str]]:
    """List each process's fields in /proc/PID/stat from its state on, the third."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            yield stat.read_text().rpartition(")")[2].split()
