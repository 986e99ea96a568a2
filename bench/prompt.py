"""`python -m bench.prompt`: what a user waits for from the prompt, and how much of it is Prefect's.

A 3P1D on a lab that needs no change, and beside it a flow that does nothing: by a command with a
Prefect server, by one without, and as a run of a deployment on a worker. And `status`, beside a
command that does nothing. Everything that is started is taken down again.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.command import measured, say
from bench.lab_service import LabService, write_file
from bench.prefect_server import PrefectServer
from pd_deploy.flows.deployment_file import DIRECTORIES
from pd_deploy.lab import Lab
from pd_deploy.lab.lifecycle import take_down

NAME = "pdbench"
SUBNET = "10.80.0.0/24"
BLOCK = "bench-ssh"
POOL = "bench-pool"
DEPLOYMENT = "bench"
POLL_S = 0.1
RECORDED_WITHIN_S = 60  # Prefect writes task runs in batches, a few seconds late
EXPECTED_S = {
    "command, with a server": 5.0,
    "command, no server set up": 8.0,
    "worker, to the first step": 4.0,
    "pd-deploy status": 2.0,
}
EMPTY = """\
from prefect import flow, task

@task
def step(): pass

@flow
def floor(): step()

if __name__ == "__main__":
    floor()
"""
"""A flow that does nothing, in one step."""
CONFIG = """\
pull:
  - prefect.deployments.steps.set_working_directory: {{directory: {directory}}}
deployments:
  - name: {name}
    entrypoint: {entrypoint}
    work_pool: {{name: {pool}}}
    parameters: {parameters}
"""


@dataclass(frozen=True)
class Wait:
    """What a user waits for, in s: for pd-deploy, and for a flow or a command that does nothing."""

    ours: float
    floor: float


class Prompt:
    """A service on a lab that needs no change, as users reach it."""

    def __init__(self, lab: Lab, prefect: PrefectServer, directory: Path) -> None:
        self._directory = directory
        self._prefect = prefect
        self._lab = lab
        self._service = LabService(write_file(lab, directory / "bench-3p1d.yaml",
                                              ssh={"credentials": BLOCK}), lab)  # fmt: skip
        self._empty = directory / "floor.py"
        self._empty.write_text(EMPTY)
        home = str(directory / "alone")
        self._alone = {k: v for k, v in prefect.env.items() if k != "PREFECT_API_URL"}
        self._alone |= {"PREFECT_HOME": home, "HOME": home}
        for env in (prefect.env, self._alone):
            self._run(env, "pd-deploy", "credentials", "ssh", BLOCK, "--private-key",
                      str(lab.ssh_key), "--known-hosts", str(lab.known_hosts))  # fmt: skip

    def bring_up(self) -> None:
        """Deploy the service, and start a worker with both deployments."""
        self._service.clean()
        self._run(self._prefect.env, "pd-deploy", "deploy", self._service.file)
        self._prefect.start_worker(POOL)
        self._deploy("pd_deploy.flows.deploy.deploy", f"{{file: {self._service.file}}}")
        self._deploy("floor.py:floor", "{}")

    def by_command(self) -> Wait:
        """Run the command with a server, from the prompt to the prompt."""
        return self._both(self._prefect.env)

    def alone(self) -> Wait:
        """Run the command where no server is set up; it keeps one, a bare flow starts its own."""
        return self._both(self._alone)

    def stop(self) -> None:
        """Stop the server that the command keeps."""
        self._run(self._alone, "pd-deploy", "server", "stop")

    def status(self) -> Wait:
        """Ask what serves, and for pd-deploy's version."""
        ours = self._run(self._prefect.env, "pd-deploy", "status", self._service.file)
        return Wait(ours, self._run(self._prefect.env, "pd-deploy", "--version"))

    def by_worker(self) -> dict[str, Wait]:
        """Run the deployments; by the part of the time from the command to the first step."""
        ours = self._parts("pd-deploy")
        floor = self._parts("floor")
        return {part: Wait(ours[part], floor[part]) for part in ours}

    def _both(self, env: Mapping[str, str]) -> Wait:
        ours = self._run(env, "pd-deploy", "deploy", self._service.file)
        return Wait(ours, self._run(env, sys.executable, str(self._empty)))

    def _deploy(self, entrypoint: str, parameters: str) -> None:
        (self._directory / "prefect.yaml").write_text(
            CONFIG.format(directory=self._directory, name=DEPLOYMENT, entrypoint=entrypoint,
                          pool=POOL, parameters=parameters)
        )  # fmt: skip
        self._run(self._prefect.env, "prefect", "--no-prompt", "deploy", "--all")

    def _parts(self, flow: str) -> dict[str, float]:
        ask = self._prefect.ask
        begin = time.time()
        self._run(self._prefect.env, "prefect", "deployment", "run", f"{flow}/{DEPLOYMENT}")
        of_flow = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1}
        of_flow |= {"flow_runs": {"deployment_id": {"is_null_": False}}}
        deadline = time.monotonic() + RECORDED_WITHIN_S
        while True:
            runs = ask("POST", "flow_runs/filter", of_flow)
            if runs and runs[0]["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED"):
                run = runs[0]
                steps = ask(
                    "POST", "task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}}
                )
                starts = [_seconds(step["start_time"]) for step in steps if step["start_time"]]
                if starts and _seconds(run["created"]) > begin:
                    break
            if time.monotonic() > deadline:
                raise RuntimeError(f"expected a run of {flow} to end within {RECORDED_WITHIN_S} s")
            time.sleep(POLL_S)
        if run["state"]["type"] != "COMPLETED":
            raise RuntimeError(f"expected the run of {flow} to complete, found {run['state']}")
        states = ask("GET", f"flow_run_states/?flow_run_id={run['id']}")
        taken, running = (_first(states, kind) for kind in ("PENDING", "RUNNING"))
        created = _seconds(run["created"])
        return {
            "prefect deployment run": created - begin,
            "until a worker takes it": taken - created,
            "until the flow runs": running - taken,
            "until its first step": min(starts) - running,
        }

    def _run(self, env: Mapping[str, str], *argv: str) -> float:
        """Run a command; return how long it took, in s."""
        begin = time.monotonic()
        done = subprocess.run(
            argv, env=env, cwd=self._directory, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"`{' '.join(argv)}` failed:\n{done.stdout}{done.stderr}")
        return time.monotonic() - begin


def _seconds(when: str) -> float:
    return datetime.fromisoformat(when).timestamp()


def _first(states: list[dict[str, Any]], kind: str) -> float:
    return min(_seconds(state["timestamp"]) for state in states if state["type"] == kind)


@contextmanager
def on_lab() -> Iterator[Prompt]:
    """Give the service on a lab of its own; take all down afterwards in any case."""
    try:
        lab = Lab.up(NAME, SUBNET)
        with TemporaryDirectory(prefix="pd-bench-") as path:
            settings = {DIRECTORIES: path, "PREFECT_WORKER_QUERY_SECONDS": "1"}
            with PrefectServer(Path(path), settings) as prefect:
                prompt = Prompt(lab, prefect, Path(path))
                try:
                    yield prompt
                finally:
                    prompt.stop()
    finally:
        take_down(NAME)


def bench(runs: int) -> dict[str, list[Wait]]:
    """Measure each way several times."""
    say("starting a lab, a Prefect server and a worker")
    waits: dict[str, list[Wait]] = {}
    with on_lab() as prompt:
        prompt.bring_up()
        for number in range(1, runs + 1):
            measures = {
                "command, with a server": prompt.by_command(),
                "command, no server set up": prompt.alone(),
            }
            parts = prompt.by_worker()
            asking = parts.pop("prefect deployment run")
            measures["worker, to the first step"] = Wait(
                sum(part.ours for part in parts.values()),
                sum(part.floor for part in parts.values()),
            )
            measures["prefect deployment run, before it"] = asking
            measures["pd-deploy status"] = prompt.status()
            for name, wait in (
                measures | {f"- {name}": part for name, part in parts.items()}
            ).items():
                waits.setdefault(name, []).append(wait)
            say(f"{number} of {runs}: {', '.join(f'{w.ours:.1f} s' for w in measures.values())}")
        prompt.stop()
        waits["command, server started first"] = [prompt.alone()]
        say("taking the lab down")
    return waits


def table(waits: Mapping[str, list[Wait]]) -> str:
    """Format the medians as a table for people."""
    rows = [f"{'seconds':36}{'pd-deploy':>10}{'nothing':>12}"]
    for name, several in waits.items():
        ours, floor = (statistics.median(values) for values in
                       ([w.ours for w in several], [w.floor for w in several]))  # fmt: skip
        verdict = ""
        if name in EXPECTED_S:
            met = "met" if ours <= EXPECTED_S[name] else "MISSED"
            verdict = f"   expected: {EXPECTED_S[name]:g} or less: {met}"
        rows.append(f"{name:36}{ours:10.2f}{floor:12.2f}{verdict}")
    return "\n".join([f"3P1D on two simulated hosts, {os.cpu_count()} cores", "", *rows])


def main() -> int:
    """Run the command; return 0 if all runs went well."""
    parser = argparse.ArgumentParser(prog="bench.prompt", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="how often (default: 3)")
    options = parser.parse_args()
    print(f"\n{table(measured('bench.prompt', lambda: bench(options.runs)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
