"""Prefect as docs/production.md sets it up, from the files in deploy/: whatever of it dies during
an upgrade, the upgrade completes, or its recovery does."""

import os
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.lab_service import INSTANCES
from demo import services
from demo.processes import Processes
from demo.production import Production, environments
from pd_deploy.lab import Lab
from tests import wheel
from tests.e2e.conftest import BLOCK, Service, long, until

NAME = services.EXAMPLE
POOL = "site-a"
WORKERS = ("worker-1", "worker-2")
PATIENCE_S = 300  # of a test on a busy machine
# Beside that: what Prefect's services were doing when Redis was killed is done again after 5 min.
REDELIVERED_S = 300


class Site:
    """A control plane, its workers, and a service whose files are in git."""

    def __init__(self, production: Production, service: Service, python: str) -> None:
        self.production = production
        self.processes = production.processes
        self.service = service
        self.python = python
        auth = production.client_env("test")["PREFECT_API_AUTH_STRING"].split(":")
        self.api = httpx.Client(
            base_url=f"{production.url}/api/",
            auth=(auth[0], auth[1]),
            verify=ssl.create_default_context(cafile=production.directory / "tls.pem"),
            trust_env=False,
            timeout=30,
        )
        self.generation = 0

    def run(self, *argv: str) -> str:
        """Runs a command as an operator does, in the files' directory."""
        env = self.production.client_env("operator") | services.GIT
        done = subprocess.run(
            argv, env=env, cwd=self.directory, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    @property
    def directory(self) -> Path:
        return self.service.path.parent

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """Asks the API, again while a part of it is away."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self.api.request(method, path, json=body or None)
                if answer.is_success:
                    return answer.json() if answer.content else None
                assert answer.status_code >= 500, answer.text
                why = answer.text
            except httpx.TransportError as error:
                why = str(error)
            assert time.monotonic() < deadline, f"{path}: {why}"
            time.sleep(0.2)

    def change(self, **overrides: dict[str, object]) -> None:
        """Changes the deployment file in git."""
        services.change(self.directory, overrides)
        self.run("git", "commit", "-aqm", "change")
        self.run("git", "push", "-q")

    def begin(self, load: float) -> str:
        """Starts an upgrade, and waits until its servers load; the id of its run.

        Args:
            load: how long they do, in seconds.
        """
        self.generation += 1
        self.change(settings={"all": {"environment": {"EXAMPLE": str(self.generation)}}})
        self.service.faults("p1", load_seconds=load)
        run = self.deploy()
        until(lambda: self.has_done(run, "serve: start server p1"), PATIENCE_S)
        return run

    def deploy(self) -> str:
        """Starts a run of the deployment; its id."""
        deployment = self.ask("GET", f"deployments/name/pd-deploy/{NAME}")
        run = self.ask("POST", f"deployments/{deployment['id']}/create_flow_run", state=SCHEDULED)
        return str(run["id"])

    def state(self, run: str) -> dict[str, Any]:
        state: dict[str, Any] = self.ask("GET", f"flow_runs/{run}")["state"]
        return state

    def ended(self, run: str, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """The state in which a run ended."""
        deadline = time.monotonic() + timeout
        while (state := self.state(run))["type"] not in FINAL:
            assert time.monotonic() < deadline, f"not ended in {timeout} s: {state}"
            time.sleep(0.3)
        return state

    def runs_of(self, flow: str) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = self.ask(
            "POST", "flow_runs/filter", flows={"name": {"any_": [flow]}}
        )
        return runs

    def has_done(self, run: str, step: str) -> bool:
        """Whether a run has got past a step."""
        steps = self.ask(
            "POST",
            "task_runs/filter",
            flow_runs={"id": {"any_": [run]}},
            task_runs={"name": {"any_": [step]}, "state": {"type": {"any_": ["COMPLETED"]}}},
        )
        return bool(steps)

    def assert_serves(self) -> None:
        """One generation serves: each instance runs once, and clients get completions."""
        argv = ["docker", "ps", "--filter", "label=pd-deploy.deployment", "--format"]
        label = '{{.Label "pd-deploy.instance"}} {{.Label "pd-deploy.epoch"}}'
        running = [
            line
            for host in self.service.lab.hosts.values()
            for line in host.run([*argv, label]).stdout.splitlines()
        ]
        assert sorted(running) == sorted(f"{name} {self.generation}" for name in INSTANCES)
        assert self.service.completes()

    def runner(self, run: str) -> str:
        """The worker that a run came to."""
        name = self.production.worker_of(run)
        assert name
        return name


SCHEDULED = {"type": "SCHEDULED"}
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Everything up, the first generation deployed; nothing of it is left afterwards."""
    directory = tmp_path_factory.mktemp("site")
    production = Production.create(Processes(directory / "processes"))
    files = directory / "services"
    service = Service(files / f"{NAME}.yaml", lab)
    try:
        production.start()
        wheel.copy_sources(directory / "sources")
        built = wheel.build(directory / "sources", directory / "wheel")
        python = str(wheel.install(built, directory / "environment") / "python")
        site = Site(production, service, python)
        _create_services(site)
        for worker in WORKERS:
            production.start_worker(worker, POOL, python)
        site.generation = 1
        state = site.ended(site.deploy())
        assert state["type"] == "COMPLETED", state
        yield site
    finally:
        production.remove()
        service.clean()


def _create_services(site: Site) -> None:
    """Makes the service's files as a team keeps them, for the tests' lab."""
    lab = site.service.lab
    overrides: dict[str, dict[str, object]] = {
        "hosts": {name: host.address for name, host in lab.hosts.items()},
        "registry": {"host": lab.registry},
        "ssh": {"credentials": BLOCK},
        "container": {"stop_timeout": 10},
        "gates": {"ready": 60},
    }
    site.directory.mkdir()
    credentials = (BLOCK, lab.ssh_key, lab.known_hosts)
    services.create(site.run, site.directory, POOL, credentials, overrides)


def kill(site: Site, run: str, what: str) -> None:
    """Kills a part of the control plane or of the site, as a power cut does, and has it started
    again where that is what brings it back."""
    processes, production = site.processes, site.production
    if what in ("worker", "other worker"):
        here = site.runner(run)
        (other,) = set(WORKERS) - {here}
        processes.kill(here if what == "worker" else other, children=False)
        return
    processes.kill(what)
    if what == "postgres":
        production.start_postgres()
    if what == "redis":
        production.start_redis()
    if what == "nginx":
        production.start_nginx()


def mend(site: Site) -> None:
    """Starts again what a test killed for good."""
    production = site.production
    for number in ("1", "2"):
        if not site.processes.running(f"server-{number}"):
            production.start_server(number)
        if not site.processes.running(f"services-{number}"):
            production.start_services(number)
    for worker in WORKERS:
        if not site.processes.running(worker):
            production.start_worker(worker, POOL, site.python)


@pytest.mark.minutes
def test_an_upgrade_survives_everything_but_its_own_process(site: Site) -> None:
    """An API server, its machine's services and both workers die for good during an upgrade;
    PostgreSQL and Redis are killed and started again."""
    run = site.begin(load=15)
    for what in ("server-1", "services-1", "other worker", "postgres", "redis"):
        kill(site, run, what)
    kill(site, run, "worker")
    state = site.ended(run)
    assert state["type"] == "COMPLETED", state
    site.assert_serves()
    mend(site)


@long
@pytest.mark.parametrize(
    "what",
    ["server-1", "server-2", "services-1", "services-2", "worker",
     "other worker", "postgres", "redis", "nginx"],
)  # fmt: skip
def test_an_upgrade_survives(site: Site, what: str) -> None:
    mend(site)
    run = site.begin(load=10)
    started = time.monotonic()
    kill(site, run, what)
    state = site.ended(run)
    print(f"{what}: {time.monotonic() - started:.0f} s from the kill to {state['type']}")
    assert state["type"] == "COMPLETED", state
    site.assert_serves()
    assert not site.runs_of("pd-recover")


@long
def test_an_upgrade_whose_machine_dies_is_undone_by_another_worker(site: Site) -> None:
    """Worker and run are killed: the automation finds that it fell silent."""
    mend(site)
    run = site.begin(load=60)
    worker = site.runner(run)
    earlier = site.runs_of("pd-recover")
    killed = time.monotonic()
    for environment in environments():
        if environment.get("PREFECT__FLOW_RUN_ID") == run:
            os.kill(int(environment["pid"]), signal.SIGKILL)
    site.processes.kill(worker)
    site.service.faults("p1")
    patience = PATIENCE_S + REDELIVERED_S
    until(lambda: len(site.runs_of("pd-recover")) > len(earlier), patience)
    # Where it marks the dead run as crashed, that starts another one, which finds nothing to do.
    known = {run["id"] for run in earlier}
    later = [run for run in site.runs_of("pd-recover") if run["id"] not in known]
    state = site.ended(min(later, key=lambda run: str(run["created"]))["id"])
    print(f"recovered {time.monotonic() - killed:.0f} s after the kill")
    assert state["type"] == "COMPLETED", state
    site.generation -= 1
    site.assert_serves()
    assert site.state(run)["type"] == "CRASHED"
