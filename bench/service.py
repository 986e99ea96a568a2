"""The documented 3P1D on a lab, deployed by the flow and recorded by its own Prefect server."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import httpx

from bench.client import Client
from bench.lab_service import CONTAINERS, LabService, write_file
from bench.prefect_server import PrefectServer
from bench.timeline import READY, Measured, Span, measure, part_of
from bench.watch import Watch
from pd_deploy.config.load import load_deployment
from pd_deploy.lab import Lab
from pd_deploy.lab.lifecycle import take_down
from pd_deploy.planning import placement

NAME = "pdbench"
SUBNET = "10.80.0.0/24"
BLOCK = "bench-ssh"
POLL_S = 0.05  # the precision of what is measured, in s
RECORDS_TIMEOUT_S = 20  # Prefect writes task runs in batches, a few seconds late


@dataclass(frozen=True)
class Upgrade:
    """What an upgrade cost, in s: `down`, the client's time without a completion, and `load`, its
    part from Docker's start of the last server until all were ready."""

    down: float
    load: float


class Service:
    """A deployment file for the lab, and a Prefect server that records its runs."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self._lab = lab
        ssh = {"credentials": BLOCK}
        self._service = LabService(write_file(lab, directory / "bench-3p1d.yaml", ssh=ssh), lab)
        self._prefect = PrefectServer(directory)

    def __enter__(self) -> Self:
        self._prefect.__enter__()
        key, known = str(self._lab.ssh_key), str(self._lab.known_hosts)
        save = ["pd-deploy", "credentials", "ssh", BLOCK]
        try:
            self._prefect.run(*save, "--private-key", key, "--known-hosts", known)
        except BaseException:
            self._prefect.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._prefect.__exit__()

    def clean(self) -> None:
        """Remove the service from the hosts, except the image."""
        for host in self._lab.hosts.values():
            ids = host.run(CONTAINERS).stdout.split()
            if ids:
                host.run(["docker", "rm", "-f", *ids])
            host.run(["rm", "-rf", "/var/lib/pd-deploy", "/data/log_path"])

    def bring_up(self) -> Measured:
        """Run the flow on clean hosts."""
        with _ServersWatch(self._health_urls()) as watch:
            self._deploy()
            ready = watch.all_answered()
        return measure(*self._records(), Span(self._last_start(), ready))

    def run_again(self) -> Measured:
        """Run the flow on a service that needs no change."""
        self._deploy()
        return measure(*self._records(), None)

    def upgrade(self, number: int) -> Upgrade:
        """Run the flow on a changed file while a client keeps asking."""
        self._service.change(settings={"all": {"environment": {"BENCH": str(number)}}})
        with Client(self._service.url) as client:
            self._deploy()
            client.served_again()
        _, tasks = self._records()
        ready = max(span.end for name, span in tasks if part_of(name) == READY)
        return Upgrade(client.gap, (ready - self._last_start()).total_seconds())

    def _deploy(self) -> None:
        self._prefect.run("pd-deploy", "deploy", self._service.file)

    def _health_urls(self) -> list[str]:
        built = placement.build(load_deployment(self._service.path))
        return [f"http://{server}/health" for pod in built.pods for server in pod.servers]

    def _last_start(self) -> datetime:
        """Return when Docker started the last server."""
        return max(
            datetime.fromisoformat(container["State"]["StartedAt"])
            for container in self._service.containers().values()
            if container["Config"]["Labels"]["pd-deploy.role"] != "proxy"
        )

    def _records(self) -> tuple[Span, list[tuple[str, Span]]]:
        """Read the last flow run and its task runs from Prefect's API."""
        run = self._ask("flow_runs", {"sort": "START_TIME_DESC", "limit": 1})[0]
        of_the_run = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        deadline = time.monotonic() + RECORDS_TIMEOUT_S
        while True:
            # Prefect records task runs from events, some of which arrive after the run's end.
            tasks = self._ask("task_runs", of_the_run)
            if all(task["end_time"] for task in tasks) and any(
                part_of(task["name"]) == "smoke test" for task in tasks
            ):
                return Span.of(run), [(task["name"], Span.of(task)) for task in tasks]
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"expected all task runs of {run['name']} to be recorded as ended within "
                    f"{RECORDS_TIMEOUT_S} s, found {len(tasks)}, not all of them ended"
                )
            time.sleep(POLL_S)

    def _ask(self, kind: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        objects: list[dict[str, Any]] = self._prefect.ask("POST", f"{kind}/filter", body)
        return objects


@contextmanager
def on_lab() -> Iterator[Service]:
    """Give the service on a lab of its own; take both down afterwards in any case."""
    try:
        lab = Lab.up(NAME, SUBNET)
        with TemporaryDirectory(prefix="pd-bench-") as path, Service(lab, Path(path)) as service:
            service.clean()
            yield service
    finally:
        take_down(NAME)


class _ServersWatch(Watch):
    """A watch on the servers' health endpoints, independent of the flow."""

    def __init__(self, urls: list[str]) -> None:
        super().__init__()
        self._left = list(urls)
        self._last: datetime | None = None

    def all_answered(self) -> datetime:
        """Return when the last of them answered for the first time."""
        if self._left or self._last is None:
            raise RuntimeError(f"expected all servers to be ready, found some not: {self._left}")
        return self._last

    def _watch(self) -> None:
        with httpx.Client(trust_env=False, timeout=1) as client:
            while self._left and not self._over.wait(POLL_S):
                self._left = [url for url in self._left if not self._healthy(client, url)]

    def _healthy(self, client: httpx.Client, url: str) -> bool:
        try:
            if client.get(url).status_code != 200:
                return False
        except httpx.HTTPError:
            return False
        self._last = datetime.now(UTC)
        return True
