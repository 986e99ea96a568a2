"""`python -m bench.hosts`: what runs on 2, 8, 24 and 48 hosts of a lab cost, and how that grows.

CPU time is compared rather than wall time: all the simulated hosts share this machine. Everything
that is started is taken down again.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from bench.command import measured, say
from bench.lab_service import CONTAINERS, LOGS, ROOT, STATE
from bench.prefect_server import SERVER, PrefectServer
from demo import fleet
from pd_deploy.lab import Lab, LabHost
from pd_deploy.lab.host import SSHD_LOG
from pd_deploy.lab.lifecycle import side_by_side, take_down

NAME = "pdbench"
SUBNET = "10.80.0.0/24"
BLOCK = "bench-ssh"
LOGIN, SESSION = "Accepted publickey ", "Starting session: "  # in the log of an SSH server
RECORDED_WITHIN_S = 120  # Prefect writes task runs in batches, late on a busy machine
POLL_S = 0.2
HOSTS = (2, 8, 24, 48)
KINDS = {
    "cold": "clean hosts that have the image",
    "nothing to do": "the same file again",
    "upgrade": "a changed file: a new generation on all hosts",
}
EXPECTED_CPU_S = {"nothing to do": 12.0, "upgrade": 20.0}  # the controller's, on 48 hosts
EXPECTED_GROWTH = 2.2  # from 24 hosts to 48
HEADINGS = ("wall s", "controller CPU s", "server CPU s", "tasks", "SSH logins", "SSH sessions")


@dataclass(frozen=True)
class Cost:
    """What a run cost.

    Attributes:
        wall: s, of the command, with starting Python and importing Prefect.
        controller: CPU time of the command, in s.
        server: CPU time of the Prefect server, in s.
        tasks: task runs.
        logins: SSH connections to all hosts.
        sessions: commands and SFTP sessions in them; Docker is asked in channels besides.
    """

    wall: float
    controller: float
    server: float
    tasks: float
    logins: float
    sessions: float


Costs = dict[str, dict[int, Cost]]
"""By kind of run and number of hosts."""


class Fleet:
    """A service over hosts of a lab, deployed by the command and recorded by a Prefect server."""

    def __init__(self, lab: Lab, prefect: PrefectServer, directory: Path) -> None:
        self._lab = lab
        self._prefect = prefect
        self._file = directory / "lab-fleet.yaml"
        self._log = directory / "command.log"
        key, known = str(lab.ssh_key), str(lab.known_hosts)
        save = ["pd-deploy", "credentials", "ssh", BLOCK]
        prefect.run(*save, "--private-key", key, "--known-hosts", known)

    def describe(self, count: int, environment: str = "") -> None:
        """Write the file of a service over so many hosts; another environment makes another
        generation."""
        addresses = {name: host.address for name, host in self._lab.hosts.items()}
        some = dict(itertools.islice(addresses.items(), count))
        # One server on each of decode's hosts: what is measured is not the engine.
        document = fleet.document(some, decode_devices=1) | {
            "registry": {"host": self._lab.registry},
            "ssh": {"credentials": BLOCK},
            "settings": {"all": {"environment": {"BENCH": environment or "no"}}},
        }
        self._file.write_text(yaml.safe_dump(document))

    def clean(self) -> None:
        """Remove the service from the hosts, except the image."""
        side_by_side(_clean, self._lab.hosts.values())

    def cost(self) -> Cost:
        """Deploy the file, and measure what that costs."""
        logins, sessions = self._logged(LOGIN), self._logged(SESSION)
        server, begin = self._prefect.cpu_seconds(SERVER), time.monotonic()
        controller = self._deploy()
        wall = time.monotonic() - begin
        tasks = self._recorded()
        return Cost(
            wall=wall,
            controller=controller,
            server=self._prefect.cpu_seconds(SERVER) - server,
            tasks=tasks,
            logins=self._logged(LOGIN) - logins,
            sessions=self._logged(SESSION) - sessions,
        )

    def _deploy(self) -> float:
        """Run the command; return the CPU time that it used, in s."""
        argv = ["pd-deploy", "deploy", str(self._file)]
        with self._log.open("w+") as log:
            process = subprocess.Popen(
                argv, env=self._prefect.env, cwd=ROOT, stdout=log, stderr=log
            )
            try:
                _, status, used = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()  # its hosts are taken down now
                process.wait()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"`{' '.join(argv)}` failed:\n{log.read()}")
        return used.ru_utime + used.ru_stime

    def _logged(self, words: str) -> int:
        """Count the lines with some words in the logs of all hosts' SSH servers."""
        logs = (host.path(SSHD_LOG) for host in self._lab.hosts.values())
        return sum(log.read_text().count(words) for log in logs)

    def _recorded(self) -> int:
        """Count the task runs of the last flow run, once all are recorded as completed."""
        newest = {"sort": "START_TIME_DESC", "limit": 1}
        run = self._prefect.ask("POST", "flow_runs/filter", newest)[0]
        of_run = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        completed = of_run | {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        last = of_run | {"task_runs": {"name": {"any_": ["serve: promote"]}}}
        deadline = time.monotonic() + RECORDED_WITHIN_S
        while True:
            count, done, ended = (
                int(self._prefect.ask("POST", "task_runs/count", which))
                for which in (of_run, completed, last)
            )
            if ended and count == done:
                return count
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"expected all task runs of {run['name']} to be recorded as completed within "
                    f"{RECORDED_WITHIN_S} s, found {done} of {count}"
                )
            time.sleep(POLL_S)


def _clean(host: LabHost) -> None:
    ids = host.run(CONTAINERS).stdout.split()
    if ids:
        host.run(["docker", "rm", "-f", *ids])
    host.run(["rm", "-rf", STATE, LOGS])


@contextmanager
def on_lab(hosts: int) -> Iterator[Fleet]:
    """Give the service on a lab of its own; take both down afterwards in any case."""
    try:
        lab = Lab.up(NAME, SUBNET, hosts=hosts)
        with TemporaryDirectory(prefix="pd-bench-") as path, PrefectServer(Path(path)) as prefect:
            yield Fleet(lab, prefect, Path(path))
    finally:
        take_down(NAME)


def bench(hosts: Sequence[int]) -> Costs:
    """Measure a run of each kind on so many hosts."""
    costs: Costs = {kind: {} for kind in KINDS}
    say(f"starting a lab of {max(hosts)} hosts and a Prefect server")
    with on_lab(max(hosts)) as service:
        service.describe(max(hosts))
        say(f"{max(hosts)} hosts: warm-up, with the pull")
        service.cost()
        service.clean()
        for count in sorted(set(hosts), reverse=True):
            service.describe(count)
            for kind, of_count in costs.items():
                if kind == "upgrade":
                    service.describe(count, "changed")
                of_count[count] = service.cost()
                say(f"{count} hosts, {kind}: {_cells(of_count[count])}")
            service.clean()
        say("taking the lab down")
    return {kind: dict(sorted(by_hosts.items())) for kind, by_hosts in costs.items()}


def table(costs: Costs) -> str:
    """Format the costs as a Markdown table, and say what each further host adds."""
    lines = [f"| run | hosts | {' | '.join(HEADINGS)} |", f"|---|{'---:|' * (len(HEADINGS) + 1)}"]
    for kind, by_hosts in costs.items():
        lines += [f"| {kind} | {count} | {_cells(cost)} |" for count, cost in by_hosts.items()]
        few, many = min(by_hosts), max(by_hosts)
        if many > few:
            each = _each(by_hosts[few], by_hosts[many], many - few)
            lines.append(f"| {kind} | each further host | {_cells(each)} |")
    lines += ["", *(f"{kind}: {meaning}." for kind, meaning in KINDS.items()), ""]
    return "\n".join([*lines, *verdicts(costs)])


def verdicts(costs: Costs) -> list[str]:
    """Compare the costs with what is expected, as far as they were measured. Pure."""
    said = []
    for kind, by_hosts in costs.items():
        for fewer, more in itertools.pairwise(sorted(by_hosts)):
            if (fewer, more) == (24, 48):
                growth = by_hosts[more].controller / by_hosts[fewer].controller
                verdict = "met" if growth <= EXPECTED_GROWTH else "MISSED"
                said.append(
                    f"{kind}: {growth:.2f} times the controller's CPU on 48 hosts as on 24 "
                    f"(expected: {EXPECTED_GROWTH:g} or less: {verdict})"
                )
        if kind in EXPECTED_CPU_S and 48 in by_hosts:
            seconds, expected = by_hosts[48].controller, EXPECTED_CPU_S[kind]
            verdict = "met" if seconds <= expected else "MISSED"
            said.append(
                f"{kind}: {seconds:.1f} s of the controller's CPU on 48 hosts "
                f"(expected: {expected:g} or less: {verdict})"
            )
    return said


def as_json(costs: Costs) -> str:
    """Format the costs for programs."""
    return json.dumps(
        {
            kind: {count: asdict(cost) for count, cost in by_hosts.items()}
            for kind, by_hosts in costs.items()
        },
        indent=2,
    )


def main() -> int:
    """Run the command; return 0 if all runs went well."""
    parser = argparse.ArgumentParser(prog="bench.hosts", description=__doc__)
    parser.add_argument("hosts", type=int, nargs="*", default=HOSTS, help="numbers of hosts")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args()
    costs = measured("bench", lambda: bench(options.hosts))
    print(as_json(costs) if options.json else f"\n{table(costs)}")
    return 0


def _each(least: Cost, most: Cost, hosts: int) -> Cost:
    grown = zip(astuple(least), astuple(most), strict=True)
    return Cost(*((after - before) / hosts for before, after in grown))


def _cells(cost: Cost) -> str:
    values = (getattr(cost, field.name) for field in fields(cost))
    return " | ".join(
        f"{value:.2f}" if isinstance(value, float) else f"{value}" for value in values
    )


if __name__ == "__main__":
    sys.exit(main())
