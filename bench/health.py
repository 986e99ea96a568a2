"""`python -m bench.health`: how soon a service that lost a part serves again by itself.

A 3P1D on a lab, and its check of health by schedule on a worker. A prefill is killed, then a host
is rebooted; each time the check that sees it says when it was due, when it saw it, and when clients
were served again. Everything that is started is taken down again.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.client import WaitingClient
from bench.command import measured, say
from bench.lab_service import LabService, write_file
from bench.prefect_server import PrefectServer
from bench.timeline import READY, Span, part_of
from pd_deploy.flows.deployment_file import DIRECTORIES
from pd_deploy.flows.past_checks import MENDED
from pd_deploy.lab import Lab
from pd_deploy.lab.lifecycle import take_down

NAME, SUBNET = "pdhealth", "10.86.0.0/24"
BLOCK, POOL, FLOW, DEPLOYMENT = "bench-ssh", "bench-pool", "pd-health", "bench"
EVERY_S = 30
# As deploy/worker.env has them: a check's process starts so long before it is due.
QUERY_S, PREFETCH_S = 2, 20
SEEN_WITHIN_S, SERVES_WITHIN_S = 2.0, 5.0
# Each fault counts as the first: health waits longer after each further one within this time.
HEALTH = {"within": 1}
POLL_S = 1.0
TIMEOUT_S = 300
CONFIG = """\
pull:
  - prefect.deployments.steps.set_working_directory: {{directory: {directory}}}
deployments:
  - name: {name}
    entrypoint: pd_deploy.flows.health.health
    work_pool: {{name: {pool}}}
    parameters: {{file: {file}}}
    schedules: [{{slug: health, interval: {every}}}]
    concurrency_limit: {{limit: 1, collision_strategy: CANCEL_NEW}}
"""


@dataclass(frozen=True)
class Mend:
    """How a service came back; all in seconds.

    Attributes:
        waited: from the fault to when the check that saw it was due; after a reboot, from when the
            host answered again.
        seen: from then until the check had seen it.
        loading: from when the last server was started until all were ready.
        serving: from when it was seen until a client was served that kept asking.
    """

    waited: float
    seen: float
    loading: float
    serving: float

    @property
    def besides_loading(self) -> float:
        """What the service was down for besides loading, once the fault was seen."""
        return self.serving - self.loading


class Watched:
    """A service on a lab that a check by schedule keeps up."""

    def __init__(self, lab: Lab, prefect: PrefectServer, directory: Path) -> None:
        self._prefect = prefect
        self._lab = lab
        file = write_file(lab, directory / "bench-3p1d.yaml", ssh={"credentials": BLOCK},
                          health=HEALTH)  # fmt: skip
        self._service = LabService(file, lab)
        prefect.run("pd-deploy", "credentials", "ssh", BLOCK, "--private-key", str(lab.ssh_key),
                    "--known-hosts", str(lab.known_hosts))  # fmt: skip
        self._service.clean()
        prefect.run("pd-deploy", "deploy", self._service.file)
        prefect.start_worker(POOL)
        config = directory / "prefect.yaml"
        config.write_text(
            CONFIG.format(directory=directory, name=DEPLOYMENT, pool=POOL,
                          file=self._service.file, every=EVERY_S)
        )  # fmt: skip
        prefect.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(config))
        self._until("a check that finds all well", lambda: self._checks("Completed"))

    def after_a_kill(self) -> Mend:
        """Kill a prefill."""
        return self._mend(lambda: self._service.kill("p1"))

    def after_a_reboot(self) -> Mend:
        """Reboot a host, with a prefill and the decode on it."""
        return self._mend(self._lab.hosts["b"].reboot)

    def _mend(self, fault: Callable[[], None]) -> Mend:
        known = {run["id"] for run in self._checks(MENDED)}

        def mended() -> list[dict[str, Any]]:
            return [run for run in self._checks(MENDED) if run["id"] not in known]

        with WaitingClient(self._service.url) as client:
            begin = datetime.now(UTC)
            fault()
            there = datetime.now(UTC)
            # The server is not asked before: that would slow down what is measured.
            served = client.served(TIMEOUT_S)
        (run, *_) = self._until("a check that mends it", mended)
        steps = self._steps(run["id"])
        seen = self._first_warning(run["id"])
        ready = max(span.end for name, span in steps if part_of(name) == READY)
        due = datetime.fromisoformat(run["expected_start_time"])
        started = max(
            datetime.fromisoformat(container["State"]["StartedAt"])
            for container in self._service.containers().values()
            if container["Config"]["Labels"]["pd-deploy.role"] != "proxy"
        )
        if due < begin:
            say(f"the check of {due:%H:%M:%S} was under way already; it counts from the fault")
        due = max(due, begin)
        return Mend(
            *(
                span / timedelta(seconds=1)
                for span in (max(due - there, timedelta()), seen - due, ready - started,
                             served - seen)
            )
        )  # fmt: skip

    def _checks(self, name: str) -> list[dict[str, Any]]:
        """List the checks that ended in a state of that name."""
        runs: list[dict[str, Any]] = self._prefect.ask(
            "POST",
            "flow_runs/filter",
            {
                "flows": {"name": {"any_": [FLOW]}},
                "flow_runs": {"state": {"name": {"any_": [name]}}},
                "sort": "START_TIME_DESC",
            },
        )
        return runs

    def _steps(self, run: str) -> list[tuple[str, Span]]:
        """Read a run's steps, once all are recorded as ended: Prefect does it a little late."""
        of_run = {"flow_runs": {"id": {"any_": [run]}}}

        def recorded() -> list[tuple[str, Span]]:
            tasks = self._prefect.ask("POST", "task_runs/filter", of_run)
            spans = [(t["name"], Span.of(t)) for t in tasks if t["start_time"] and t["end_time"]]
            opened = any(part_of(name) == "open proxy" for name, _ in spans)
            return spans if opened and len(spans) == len(tasks) else []

        return self._until("all of a run's steps", recorded)

    def _first_warning(self, run: str) -> datetime:
        """Return when a check said what is wrong."""
        of_run = {"logs": {"flow_run_id": {"any_": [run]}, "level": {"ge_": 30}}}

        def logged() -> list[dict[str, Any]]:
            of_time: list[dict[str, Any]] = self._prefect.ask(
                "POST", "logs/filter", {**of_run, "sort": "TIMESTAMP_ASC", "limit": 1}
            )
            return of_time

        return datetime.fromisoformat(self._until("a check's log", logged)[0]["timestamp"])

    def _until(self, what: str, ask: Callable[[], list[Any]]) -> list[Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := ask()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"expected {what} within {TIMEOUT_S} s")
            time.sleep(POLL_S)
        return found


@contextmanager
def on_lab() -> Iterator[Watched]:
    """Give the service on a lab of its own; take all down afterwards in any case."""
    try:
        lab = Lab.up(NAME, SUBNET)
        with TemporaryDirectory(prefix="pd-bench-") as path:
            settings = {
                DIRECTORIES: path,
                "PREFECT_WORKER_QUERY_SECONDS": str(QUERY_S),
                "PREFECT_WORKER_PREFETCH_SECONDS": str(PREFETCH_S),
            }
            with PrefectServer(Path(path), settings) as prefect:
                yield Watched(lab, prefect, Path(path))
    finally:
        take_down(NAME)


def bench(runs: int) -> dict[str, list[Mend]]:
    """Measure each fault several times."""
    say("starting a lab, a Prefect server and a worker, and deploying")
    mends: dict[str, list[Mend]] = {"a killed prefill": [], "a rebooted host": []}
    with on_lab() as watched:
        for number in range(1, runs + 1):
            mends["a killed prefill"].append(watched.after_a_kill())
            mends["a rebooted host"].append(watched.after_a_reboot())
            say(f"{number} of {runs}: " + "; ".join(
                f"{fault} seen after {several[-1].seen:.1f} s, served {several[-1].serving:.1f} s "
                "later" for fault, several in mends.items()
            ))  # fmt: skip
        say("taking the lab down")
    return mends


def table(mends: dict[str, list[Mend]]) -> str:
    """Format the worst of each figure as a table for people."""
    lines = [
        f"3P1D on two simulated hosts, {os.cpu_count()} cores, a check every {EVERY_S} s; seconds",
        "",
        f"{'worst of all runs':20}{'check due':>11}{'seen':>8}{'served':>9}{'loading':>9}",
    ]
    for fault, several in mends.items():
        waited, seen, serving, loading = (
            max(getattr(mend, name) for mend in several)
            for name in ("waited", "seen", "serving", "loading")
        )
        besides = max(mend.besides_loading for mend in several)
        lines.append(
            f"{fault:20}{waited:11.1f}{seen:8.1f}{serving:9.1f}{loading:9.1f}   "
            f"expected: seen within {SEEN_WITHIN_S:g}, served within loading + "
            f"{SERVES_WITHIN_S:g} (found {besides:.1f}): {'met' if is_met(several) else 'MISSED'}"
        )
    lines += ["", "check due: after the fault, or the host's return; seen: after that; served: "
              "after it was seen"]  # fmt: skip
    return "\n".join(lines)


def is_met(several: Sequence[Mend]) -> bool:
    """Tell whether all was seen, and served again, in time."""
    return all(
        mend.seen <= SEEN_WITHIN_S and mend.besides_loading <= SERVES_WITHIN_S for mend in several
    )


def main() -> int:
    """Run the command; return 0 if all was in time, else 1."""
    parser = argparse.ArgumentParser(prog="bench.health", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="how often (default: 3)")
    options = parser.parse_args()
    mends = measured("bench.health", lambda: bench(options.runs))
    print(f"\n{table(mends)}")
    return 0 if all(map(is_met, mends.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
