"""A real Prefect server with its own database, and services of the tests' own on the lab."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.processes import Processes
from lab import Lab, LabHost
from tests import prefect_settings

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
BLOCK = "test-ssh"
INSTANCES = {"p0", "p1", "p2", "d0", "c0"}
CONTAINERS = ["docker", "ps", "-aq", "--filter", "label=pd-deploy.deployment"]


@pytest.fixture(scope="session")
def prefect_env() -> Iterator[dict[str, str]]:
    """Environment of a command that talks to the tests' own Prefect server."""
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    processes = Processes(prefect_settings.HOME / "processes")
    server = [f"{BIN}/prefect", "server", "start", "--host", "127.0.0.1"]
    try:
        processes.start("server", [*server, "--port", str(prefect_settings.PORT)], env)
        processes.until("server", _answers, 120)
        yield env
    finally:
        processes.stop_all()


@pytest.fixture(scope="session")
def prefect(prefect_env: dict[str, str]) -> Callable[..., str]:
    """Runs a command against the server: its standard output, or all of it if it has to fail."""

    def run(*argv: str, status: int = 0, input: str | None = None) -> str:
        done = subprocess.run(
            argv,
            env=prefect_env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            input=input,
            check=False,
        )
        assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if status == 0 else done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def worker(
    prefect: Callable[..., str],
    prefect_env: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """A process worker on the work pool of prefect.yaml, whose deployments are applied."""
    processes = Processes(tmp_path_factory.mktemp("worker") / "processes")
    prefect("prefect", "work-pool", "create", "pd-pool", "--type", "process")
    prefect("prefect", "--no-prompt", "deploy", "--all")
    try:
        processes.start(
            "worker", [f"{BIN}/prefect", "worker", "start", "-p", "pd-pool"], prefect_env
        )
        yield
    finally:
        processes.stop_all()


@pytest.fixture(scope="session")
def ssh_block(lab: Lab, prefect: Callable[..., str]) -> str:
    """Name of a block with the lab's key, saved as a user saves it."""
    key, known = str(lab.ssh_key), str(lab.known_hosts)
    prefect("pd-deploy", "credentials", "ssh", BLOCK, "--private-key", key, "--known-hosts", known)
    return BLOCK


class Service:
    """A deployment file on the lab, and what can be seen of it there without pd-deploy."""

    def __init__(self, path: Path, lab: Lab) -> None:
        self.path = path
        self.lab = lab

    @property
    def file(self) -> str:
        return str(self.path)

    def change(self, **overrides: object) -> None:
        """Lays overrides on the file."""
        document = yaml.safe_load(self.path.read_text()) | overrides
        self.path.write_text(yaml.safe_dump(document))

    def faults(self, instance: str, **faults: object) -> None:
        """Makes an instance's engine misbehave."""
        for host in self.lab.hosts.values():
            host.run(["mkdir", "-p", "/data/standin"])
            host.run(["tee", f"/data/standin/{instance}.json"], input=json.dumps(faults))

    def containers(self, *, running: bool = False) -> dict[str, dict[str, Any]]:
        """Inspected containers by instance name, newest generation last to win."""
        found: dict[str, dict[str, Any]] = {}
        for host in self.lab.hosts.values():
            ids = host.run([*CONTAINERS, *(["--filter", "status=running"] if running else [])])
            if ids.stdout.split():
                inspected = json.loads(host.run(["docker", "inspect", *ids.stdout.split()]).stdout)
                for one in sorted(inspected, key=lambda c: c["Created"]):
                    found[one["Config"]["Labels"]["pd-deploy.instance"]] = one
        return found

    def states(self) -> dict[str, tuple[str, object]]:
        """Id and state of each container: changes when somebody touches it."""
        return {name: (c["Id"], c["State"]) for name, c in self.containers().items()}

    def host_of(self, instance: str) -> LabHost:
        return self.lab.hosts["b" if instance in ("p2", "d0") else "a"]

    def kill(self, instance: str) -> None:
        """Kills an instance's container from outside."""
        container = self.containers()[instance]
        self.host_of(instance).run(["docker", "kill", container["Id"]])

    def port_open(self) -> bool:
        """Whether somebody listens on the proxy's port."""
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((self.lab.hosts["a"].address, 7000)) == 0

    def files(self) -> dict[str, str]:
        """Checksums of all that pd-deploy wrote for containers, by host and path; its own records
        and the lease are elsewhere."""
        found = {}
        for name, host in self.lab.hosts.items():
            script = (
                "find /var/lib/pd-deploy -mindepth 3 -type f ! -name release.json ! -name plan.json "
                "2>/dev/null | sort | xargs -r sha256sum"
            )
            for line in host.run(["sh", "-c", script]).stdout.splitlines():
                digest, path = line.split(maxsplit=1)
                found[f"{name}:{path}"] = digest
        return found

    def clean(self) -> None:
        """Removes everything from the hosts, whatever state they are in."""
        for host in self.lab.hosts.values():
            host.mend()
            ids = host.run(CONTAINERS).stdout.split()
            if ids:
                host.run(["docker", "rm", "-f", *ids])
            host.run(["rm", "-rf", "/var/lib/pd-deploy", "/data/standin", "/data/log_path"])


@pytest.fixture
def service(lab: Lab, ssh_block: str, tmp_path: Path) -> Iterator[Service]:
    """The documented 3P1D on the tests' lab; nothing of it is left afterwards."""
    document = {
        "extends": str(ROOT / "deployments/lab-qwq-3p1d.yaml"),
        "hosts": {name: host.address for name, host in lab.hosts.items()},
        "registry": {"host": lab.registry},
        "ssh": {"credentials": ssh_block},
        "container": {"stop_timeout": 10},
        "gates": {"ready": 60},
    }
    path = tmp_path / "test-3p1d.yaml"
    path.write_text(yaml.safe_dump(document))
    service = Service(path, lab)
    try:
        yield service
    finally:
        service.clean()


def _answers() -> bool:
    url = f"{prefect_settings.API}/health"
    with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def until(condition: Callable[[], object], timeout: float = 30) -> None:
    """Waits for a condition; fails the test when it does not come."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout} s: {condition}"
        time.sleep(0.05)
