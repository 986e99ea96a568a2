"""One simulated host, to which everything can be done that happens to a real one."""

import http.client
import json
import socket
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pd_deploy.lab import network
from pd_deploy.lab.box import Box
from pd_deploy.lab.errors import LabError
from pd_deploy.lab.system import wait_until

ENGINE_SOCKET = "/run/docker.sock"
ENGINE_LOG = "/var/log/dockerd.log"
ENGINE_PID = "/run/docker.pid"
ENGINE_STACKS = "/run/docker/goroutine-stacks-*.log"  # written on SIGUSR1
SSHD_LOG = "/var/log/sshd.log"
SSHD_PID = "/run/sshd.pid"


class LabHost(BaseModel):
    """A simulated host with its own address, root file system, SSH server and Docker engine."""

    model_config = ConfigDict(frozen=True)

    name: str
    address: str
    box: Box
    switch: Box

    @property
    def init_pid(self) -> int:
        """Process id of the host's init on the machine.

        Raises:
            LabError: the host is off.
        """
        return self.box.init_pid

    @property
    def on(self) -> bool:
        """Whether the host has power."""
        return self.box.on

    def run(
        self,
        argv: Sequence[str],
        input: str | None = None,
        check: bool = True,
        env: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the host as root, without SSH.

        Raises:
            LabError: the host is off, or the command failed and ``check`` is set.
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds (it is ended).
        """
        return self.box.run(argv, input=input, check=check, env=env, timeout=timeout)

    def popen(
        self, argv: Sequence[str], env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command inside the host; ending the returned process ends the command."""
        return self.box.popen(argv, env=env)

    def path(self, inside: str) -> Path:
        """Return where the machine finds a file of the host (don't follow absolute symlinks)."""
        return self.box.path(inside)

    def cut(self) -> None:
        """Unplug the host's network cable: its processes keep running, but can't be reached."""
        network.set_cable(self.name, "down", self.switch)

    def mend(self) -> None:
        """Plug the network cable in again."""
        network.set_cable(self.name, "up", self.switch)

    def power_off(self) -> None:
        """End everything on the host at once; keep its disk."""
        self.box.kill()

    def power_on(self) -> None:
        """Boot the host with its old disk; return when SSH and the engine answer.

        Raises:
            LabError: the host is already on, or a part of it did not start.
        """
        if self.on:
            raise LabError(f"{self.box.name} is already on")
        self.boot()
        self.run(["rm", "-f", ENGINE_PID])
        self.start_sshd()
        self.start_engine()

    def reboot(self) -> None:
        """Fail as by a power failure, and boot with the old disk; also a host that is off.

        Raises:
            LabError: a part of it did not start.
        """
        self.power_off()
        self.power_on()

    def boot(self) -> None:
        """Start the host's namespaces and plug in its cable; start no daemons."""
        starting = self.box.start()
        # After a power failure the kernel takes a moment to remove the old cable.
        wait_until(f"the old cable of {self.name} to go", self._cable_gone, timeout=10)
        network.plug_in_host(self.name, starting.pid, self.switch)
        starting.go_on()

    def start_sshd(self) -> None:
        """Start the SSH server and wait until it accepts connections."""
        self.run(["/usr/sbin/sshd", "-E", SSHD_LOG])
        wait_until(f"sshd on {self.address}:22", self.ssh_answers, timeout=10)

    def stop_sshd(self) -> None:
        """Stop the SSH server, and close every open SSH connection."""
        self._stop(SSHD_PID)
        # Each connection has a child process of its own, which outlives the listener.
        self.drop_ssh()

    def drop_ssh(self) -> None:
        """Close every open SSH connection; new ones are accepted."""
        listener = self.run(["cat", SSHD_PID], check=False).stdout.strip()
        sessions = self.run(["pgrep", "-x", "sshd"], check=False).stdout.split()
        if dropped := [pid for pid in sessions if pid != listener]:
            self.run(["kill", *dropped], check=False)

    def start_engine(self, wait: bool = True) -> None:
        """Start the Docker engine; if ``wait`` is set, return when its API answers."""
        self.box.start_daemon(["dockerd"], ENGINE_LOG)
        if wait:
            self.wait_for_engine()

    def wait_for_engine(self) -> None:
        """Wait until the Docker engine's API answers.

        Raises:
            LabError: it did not within 60 s; the message has the end of its log.
        """
        wait_until(
            f"the Docker engine of {self.box.name}",
            self.engine_answers,
            timeout=60,
            explain=lambda: self.run(["tail", "-n", "5", ENGINE_LOG], check=False).stdout,
        )

    def stop_engine(self) -> None:
        """Stop the Docker engine as a service manager does; its containers end as well."""
        self._stop(ENGINE_PID)

    def blocked_in_engine(self) -> str:
        """Return the stacks of what has been blocked in the Docker engine for minutes.

        Raises:
            LabError: the engine does not write its stacks within 10 s.
        """
        read = ["sh", "-c", f"cat {ENGINE_STACKS}"]
        self.run(["sh", "-c", f"rm -f {ENGINE_STACKS}; kill -USR1 $(cat {ENGINE_PID})"])
        wait_until(
            f"the stacks of the Docker engine of {self.box.name}",
            lambda: bool(self.run(read, check=False).stdout),
            timeout=10,
        )
        stacks = self.run(read).stdout.split("\n\n")
        return "\n\n".join(stack for stack in stacks if " minutes" in stack.partition("\n")[0])

    def ssh_answers(self) -> bool:
        """Tell whether the host accepts connections to port 22."""
        try:
            with socket.create_connection((self.address, 22), timeout=1):
                return True
        except OSError:
            return False

    def engine_answers(self) -> bool:
        """Tell whether the host's Docker engine answers a ping."""
        return self._ask_engine("/_ping") is not None

    def containers(self) -> int | None:
        """Count the containers that run on the host; return None if its engine does not answer."""
        answer = self._ask_engine("/containers/json")
        return None if answer is None else len(json.loads(answer))

    def _ask_engine(self, url: str) -> bytes | None:
        try:
            connection = _UnixConnection(self.path(ENGINE_SOCKET))
            connection.request("GET", url)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException, LabError):
            return None
        return body if response.status == 200 else None

    def _stop(self, pid_file: str) -> None:
        recorded = self.run(["cat", pid_file], check=False).stdout.strip()
        if not recorded:
            return
        self.run(["kill", recorded], check=False)
        wait_until(
            f"process {recorded} on {self.box.name} to end",
            partial(self._gone, recorded),
            timeout=60,
        )

    def _gone(self, pid: str) -> bool:
        return self.run(["kill", "-0", pid], check=False).returncode != 0

    def _cable_gone(self) -> bool:
        return (
            self.switch.run(["ip", "link", "show", "dev", self.name], check=False).returncode != 0
        )


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket of another mount namespace."""

    def __init__(self, path: Path) -> None:
        super().__init__("engine", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
