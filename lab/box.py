"""A box: one set of namespaces with its own root file system, alive as long as its init process."""

import os
import signal
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Interface
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict

from pd_deploy.lab.errors import LabError
from pd_deploy.lab.system import SEARCH_PATH, clean_environment, start_time, wait_until

BOOT_SCRIPT = Path(__file__).with_name("boot.sh")
UNSHARE = (
    *("setsid", "--fork"),
    *("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"),
)
INSIDE_ENVIRONMENT = {
    "PATH": SEARCH_PATH,
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
}


class Init(BaseModel):
    """A box's process 1, as the machine sees it."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: int  # clock ticks since the machine's boot


class Box(BaseModel):
    """One set of namespaces (mount, network, PID, UTS, IPC).

    Its init is recorded in its directory, so that any later process finds it again.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    directory: Path
    address: str  # with prefix length
    gateway: str  # empty: this box is the switch
    layers: tuple[Path, ...]  # read-only layers of the root, topmost first
    shared: tuple[Path, ...] = ()  # of the machine, read-only, at the same paths
    devices: tuple[str, ...] = ()  # further character devices that behave like /dev/null

    @property
    def init_pid(self) -> int:
        """Process id of the box's init on the machine.

        Raises:
            LabError: the box is off.
        """
        init = recorded_init(self.directory)
        if init is None:
            raise LabError(f"{self.name} is off: run `pd-deploy lab down`, then `pd-deploy lab up`")
        return init.pid

    @property
    def on(self) -> bool:
        """Whether the box's init is alive."""
        return recorded_init(self.directory) is not None

    def path(self, inside: str) -> Path:
        """Return where the machine finds a path of the box."""
        return Path(f"/proc/{self.init_pid}/root") / inside.lstrip("/")

    def start(self) -> "Starting":
        """Make the namespaces; the box waits for its network link before it goes on."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.directory / "boot.log").open("w") as log:
            process = subprocess.Popen(
                [*UNSHARE, "sh", str(BOOT_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._boot_environment(),
            )
        return Starting(self, process)

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the machine's command that runs ``argv`` in the box; ending it ends ``argv``."""
        enter = ["nsenter", "--target", str(self.init_pid)]
        return [*enter, "-m", "-n", "-u", "-i", "-p", "setpriv", "--pdeathsig", "KILL", *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | None = None,
        check: bool = True,
        env: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the box as its root, in a minimal environment plus ``env``.

        Raises:
            LabError: the box is off, or the command failed and ``check`` is set.
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds (it is ended).
        """
        stdin = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
        done: subprocess.CompletedProcess[str] = subprocess.run(
            self.command(argv),
            **stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**INSIDE_ENVIRONMENT, **(env or {})},
            timeout=timeout,
        )
        if check and done.returncode:
            output = (done.stderr or done.stdout).strip()
            raise LabError(
                f"{self.name}: `{' '.join(argv)}` failed (exit {done.returncode}): {output}"
            )
        return done

    def popen(
        self, argv: Sequence[str], *, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in the box; ending the returned process ends the command."""
        return subprocess.Popen(
            self.command(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**INSIDE_ENVIRONMENT, **(env or {})},
        )

    def start_daemon(self, argv: Sequence[str], log: str) -> None:
        """Start a daemon in the box; append its output to the box's file ``log``."""
        script = 'log=$1; shift; exec "$@" >>"$log" 2>&1'
        detach = ["setsid", "--fork", "sh", "-c", script, "sh", log, *argv]
        # Without the death signal: a daemon outlives the process that started it.
        enter = ["nsenter", "--target", str(self.init_pid), "-m", "-n", "-u", "-i", "-p"]
        subprocess.run(
            [*enter, *detach],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            env=INSIDE_ENVIRONMENT,
        )

    def kill(self) -> bool:
        """End everything in the box at once, like a power failure; return False if it was off."""
        return kill_recorded(self.directory)

    def _boot_environment(self) -> dict[str, str]:
        return {
            **clean_environment(),
            "BOX": str(self.directory),
            "HOST": self.name,
            "LOWER": ":".join(str(layer) for layer in self.layers),
            "ADDRESS": self.address,
            "HARDWARE_ADDRESS": hardware_address(self.address),
            "GATEWAY": self.gateway,
            "SHARED": "\n".join(str(path) for path in self.shared),
            "DEVICES": " ".join(self.devices),
        }


class Starting:
    """A box whose namespaces exist and which waits for its network link."""

    def __init__(self, box: Box, process: subprocess.Popen[str]) -> None:
        self._box = box
        self._process = process
        self.pid = int(self._line())
        started = start_time(self.pid)
        if started is None:
            raise self._failed()
        # Recorded before it goes on: from now on, any process can read the record and end it.
        init = Init(pid=self.pid, started=started)
        (box.directory / "init.json").write_text(init.model_dump_json())

    def go_on(self) -> None:
        """Tell the box that its link is plugged in, and wait until it is up.

        Raises:
            LabError: the box did not start; the message has the output of its start script.
        """
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.write("plugged\n")
        stdin.close()
        if self._line() != "ready":
            raise self._failed()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise self._failed()
        return line

    def _failed(self) -> LabError:
        output = (self._box.directory / "boot.log").read_text().strip()
        return LabError(f"{self._box.name} did not start: {output or 'no message'}")


def hardware_address(address: str) -> str:
    """Derive a MAC address from an IPv4 address (with prefix length).

    A box has the same one after each boot, as a real host does: its neighbours cache it.
    """
    return ":".join(["02", "00", *(f"{byte:02x}" for byte in IPv4Interface(address).packed)])


def recorded_init(directory: Path) -> Init | None:
    """Read the init recorded in a box's directory; return None unless it is alive."""
    try:
        init = Init.model_validate_json((directory / "init.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return init if start_time(init.pid) == init.started else None


def kill_recorded(directory: Path) -> bool:
    """End the init recorded in a box's directory, and so the box; return False if it was off."""
    init = recorded_init(directory)
    if init is None:
        return False
    os.kill(init.pid, signal.SIGKILL)
    wait_until(
        f"process {init.pid} (init of {directory.name}) to end",
        lambda: recorded_init(directory) is None,
        timeout=20,
    )
    return True
