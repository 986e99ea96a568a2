"""A real Prefect server with its own database, and services of the tests' own on the lab."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from bench.lab_service import LabService, write_file
from demo.processes import Processes
from demo.services import DEPLOY_LAB
from pd_deploy.cli import planned
from pd_deploy.cli.local_http import is_healthy
from pd_deploy.cli.local_server import LocalServer
from pd_deploy.config.load import load_deployment
from pd_deploy.flows import deployment_file
from pd_deploy.lab import Lab, LabHost
from pd_deploy.lab.lifecycle import side_by_side
from tests import prefect_settings
from tests.playbook import NAMES, Playbook
from tests.samples import ALL

long = pytest.mark.skipif(not ALL, reason="long: runs with `make test-all`")
"""What the tests in memory hold to as well, with hosts that are held to these, and what repeats
another test here with other faults."""
PROCESSES = Processes(prefect_settings.HOME / "processes")
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
BLOCK = "test-ssh"
SECRET = "hf_0123456789abcdef0123456789abcdef01"
"""In the environment of the playbook's servers."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a test that failed what the Prefect server said last: its log goes with it."""
    report = yield
    if report.failed and PROCESSES.running("server"):
        report.sections.append(("The Prefect server's log", PROCESSES.tail("server", 60)))
    return report


@pytest.fixture(scope="session")
def prefect_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a command that talks to the tests' own Prefect server."""
    directory = str(tmp_path_factory.getbasetemp())
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        deployment_file.DIRECTORIES: directory,
    }
    server = [f"{BIN}/prefect", "server", "start", "--host", "127.0.0.1"]
    try:
        PROCESSES.start("server", [*server, "--port", str(prefect_settings.PORT)], env)
        PROCESSES.until("server", lambda: is_healthy(prefect_settings.API), 120)
        yield env
    finally:
        # What is still to be sent would be tried again and again once the server is gone.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
        PROCESSES.stop_all()


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


@pytest.fixture
def without_a_server(service: "Service") -> Iterator[dict[str, str]]:
    """Environment of somebody without a Prefect server, with a key in the usual place."""
    home = service.path.parent
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    env |= {"PREFECT_HOME": str(home / "prefect"), "HOME": str(home)}
    (home / ".ssh").mkdir(mode=0o700)
    sources = {"id_ed25519": service.lab.ssh_key, "known_hosts": service.lab.known_hosts}
    for name, source in sources.items():
        (home / ".ssh" / name).write_text(source.read_text())
        (home / ".ssh" / name).chmod(0o600)
    yield env
    subprocess.run([f"{BIN}/pd-deploy", "server", "stop"], env=env, check=True)


def local_server_of(env: dict[str, str]) -> LocalServer:
    """The server that a command started in an environment without one."""
    (record,) = Path(env["PREFECT_HOME"]).glob("pd-deploy/*.json")
    return LocalServer(**json.loads(record.read_text()))


@pytest.fixture(scope="session")
def worker(prefect: Callable[..., str], prefect_env: dict[str, str]) -> Iterator[None]:
    """A process worker on the work pool of demo/prefect.yaml, whose deployments are applied."""
    processes = Processes(prefect_settings.HOME / "worker")
    prefect("prefect", "work-pool", "create", "pd-pool", "--type", "process")
    prefect("prefect", *DEPLOY_LAB)
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


class Service(LabService):
    """A service on the tests' lab, with what only tests do to it and look at."""

    def states(self) -> dict[str, tuple[str, object]]:
        """Id and state of each container: changes when somebody touches it."""
        return {name: (c["Id"], c["State"]) for name, c in self.containers().items()}

    def stop_registry(self) -> None:
        """Ends the lab's registry."""
        self.lab.switch.run(["pkill", "-x", "docker-registry"])

    def start_registry(self) -> None:
        """Starts it again, and waits until it answers."""
        start = ["docker-registry", "serve", "/etc/docker/registry/config.yml"]
        self.lab.switch.start_daemon(start, "/var/log/registry.log")
        until(lambda: httpx.get(f"http://{self.lab.registry}/v2/", trust_env=False).is_success)

    def refuse_registry(self, host: str) -> None:
        """Makes a host unable to reach the registry."""
        self.lab.hosts[host].run(["ip", "rule", "add", *self._to_registry, "unreachable"])

    def allow_registry(self, host: str) -> None:
        """Undoes `refuse_registry`."""
        self.lab.hosts[host].run(["ip", "rule", "del", *self._to_registry, "unreachable"])

    def set_clock(self, host: str, *, ahead: int) -> None:
        """Has a host say that it is so many seconds later; all hosts have this machine's clock."""
        of_host, date = self.lab.hosts[host], "/usr/local/bin/date"
        script = f"#!/bin/sh\nexec /usr/bin/date -d '+{ahead} seconds' \"$@\"\n"
        if ahead:
            of_host.run(["sh", "-c", f"cat >{date} && chmod 755 {date}"], input=script)
        else:
            of_host.run(["rm", date])

    @property
    def _to_registry(self) -> list[str]:
        address, _, port = self.lab.registry.partition(":")
        return ["pref", "1", "to", address, "ipproto", "tcp", "dport", port]

    def specs(self) -> dict[str, object]:
        """What each running container was made of."""
        return {
            name: (c["Name"], c["Image"], c["Config"]["Labels"], c["Config"]["Env"],
                   c["Config"]["Cmd"], c["HostConfig"]["Mounts"], c["HostConfig"]["Devices"])
            for name, c in self.containers(running=True).items()
        }  # fmt: skip

    def finished(self, container: str) -> str:
        """When a container ended, on whichever host it is."""
        argv = ["docker", "inspect", "-f", "{{.State.FinishedAt}}", container]
        found = [host.run(argv, check=False).stdout.strip() for host in self.lab.hosts.values()]
        return max(found)

    def generations(self) -> list[str]:
        """Generations of which a host has files; the same on both."""
        script = "cd /var/lib/pd-deploy/qwq-3p1d && ls -d */ | tr -d /"
        found = [h.run(["sh", "-c", script]).stdout.split() for h in self.lab.hosts.values()]
        assert found[0] == found[1]
        return found[0]

    def hold_device(self, host: str, device: int) -> subprocess.Popen[str]:
        """A process on a host that uses an NPU."""
        code = (
            "import socket, time; s = socket.socket(socket.AF_UNIX); "
            f"s.bind('\\0standin-npu-{device}'); print('held', flush=True); time.sleep(600)"
        )
        process = self.lab.hosts[host].popen(["python3", "-c", code])
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        return process

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
                "find /var/lib/pd-deploy -mindepth 3 -type f 2>/dev/null "
                "! -name release.json ! -name plan.json | sort | xargs -r sha256sum"
            )
            for line in host.run(["sh", "-c", script]).stdout.splitlines():
                digest, path = line.split(maxsplit=1)
                found[f"{name}:{path}"] = digest
        return found


@pytest.fixture(scope="session")
def layers(lab: Lab) -> None:
    """Keeps the image's layers on the hosts, also when a test removes the image: to unpack them
    anew takes seconds."""
    repository = lab.image.rpartition(":")[0]
    image = f"{repository}@{lab.images[lab.image]}"

    def keep(host: LabHost) -> None:
        host.run(["docker", "pull", "-q", image])
        host.run(["docker", "create", "--name", "layers", image, "true"])
        host.run(["docker", "commit", "layers", "layers"])
        host.run(["docker", "rm", "layers"])
        host.run(["docker", "rmi", "-f", image])

    side_by_side(keep, lab.hosts.values())


@pytest.fixture
def service(lab: Lab, layers: None, ssh_block: str, tmp_path: Path) -> Iterator[Service]:
    """The documented 3P1D on the tests' lab; nothing of it is left afterwards."""
    overrides = {"ssh": {"credentials": ssh_block}, "container": {"stop_timeout": 10}}
    path = write_file(lab, tmp_path / "test-3p1d.yaml", **overrides, gates={"ready": 60})
    service = Service(path, lab)
    try:
        yield service
    finally:
        service.clean()


@pytest.fixture
def playbook(service: Service) -> Iterator[Playbook]:
    """The playbook's service on the lab, which serves, under the names that the file implies."""
    # Upstream's launcher, as it is, takes no port on which connections of another test are in
    # TIME_WAIT, for a minute: so these are ports that no other tests use.
    service.change(container={"stop_timeout": 10, "names": NAMES}, ports={"api": 9300})
    upstream = service.path.with_name("upstream.yaml")
    document = yaml.safe_load(service.path.read_text()) | {"name": "qwq-3p1d"}
    upstream.write_text(yaml.safe_dump({**document, "compat": "upstream"}))
    plan = planned.of(load_deployment(upstream), None).require_plan(of_all=True)
    playbook = Playbook(service.lab, plan.model_dump(mode="json"), service.lab.image)
    try:
        until(lambda: not any(map(_sockets, service.lab.hosts.values())), 90)
        playbook.start(HF_TOKEN=SECRET)
        try:
            until(service.completes, 120)
        except AssertionError as late:
            raise AssertionError(f"{late}\n{playbook.logs()}") from None
        yield playbook
    finally:
        playbook.clean()


def _sockets(host: LabHost) -> str:
    """What is left of connections to the servers of the playbook's."""
    return host.run(["ss", "-Htan", "sport >= :9300 and sport <= :9410"]).stdout


def until(condition: Callable[[], object], timeout: float = 30) -> None:
    """Waits for a condition; fails the test when it does not come."""
    deadline = time.monotonic() + timeout
    while True:
        with suppress(httpx.TransportError):
            if condition():
                return
        assert time.monotonic() < deadline, f"not in {timeout} s: {condition}"
        time.sleep(0.05)
