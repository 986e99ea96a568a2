"""`python -m bench.soak`: many upgrades in a row, with traffic and faults, and what they leave.

The images of a 3P1D on a lab alternate, and each upgrade is a run of a deployment of
demo/prefect.yaml on a worker. A client asks all the time. Faults come now and then; each has an
end that it has to come to. Whatever could grow is measured after the upgrades without a fault.
"""

import argparse
import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import httpx

from bench.client import Client
from bench.command import measured, say
from bench.growth import Comparison, Limit, compare
from bench.lab_service import INSTANCES, LOGS, STATE, LabService, write_file
from bench.prefect_server import SERVER, WORKER, PrefectServer
from demo.services import DEPLOY_LAB
from pd_deploy.flows.deployment_file import DIRECTORIES
from pd_deploy.lab import Lab, LabError
from pd_deploy.lab.lifecycle import take_down
from pd_deploy.lab.system import wait_until

NAME, SUBNET = "pdsoak", "10.81.0.0/24"
BLOCK, POOL, DEPLOYMENT = "soak-ssh", "pd-pool", "lab-qwq-3p1d"
RETENTION = timedelta(hours=1, seconds=1)  # the shortest that Prefect takes
VACUUM_S = 60
SETTINGS = {
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": str(VACUUM_S),
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ORPHAN_CLEANUP_LOOP_SECONDS": str(VACUUM_S),
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": f"{RETENTION.total_seconds():.0f}",
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"PT{RETENTION.total_seconds():.0f}S",
}
RUN_TIMEOUT_S = 600  # for a machine that is busy with other things as well
STEP_TIMEOUT_S = 120
POLL_S = 0.25
# What an upgrade that could not be followed to its end fails of, where the machine is too busy.
OF_OTHERS = (httpx.HTTPError, sqlite3.Error, subprocess.SubprocessError)
PAUSE_S = 0.1  # between two requests of the client: it is not to be the load
LOADING_S = 6.0  # long enough for a fault to come while an engine loads
FAULT_EVERY = 3
KEPT = 4  # generations: one that serves and three before it; until then containers do grow

# Prefect's processes grow for some 150 runs, then stay as they are: what they use is the same all
# the time, but the C library returns little of what they have freed, and SQLite fills its caches.
MEMORY = Limit(amount=10, share=0.1, settles=0.5)
# What each figure may be larger in the end than at first. Those of time are only told.
LIMITS = {
    "containers on the hosts": Limit(),
    "images on the hosts": Limit(),
    "files of ours on the hosts": Limit(),
    # The last 50 runs, of which some have failed, and an image in quarantine.
    "record.json, bytes": Limit(amount=45_000),
    "temporary files on the hosts": Limit(),
    "processes on the hosts": Limit(amount=2),
    "descriptors of the engines": Limit(amount=5),
    "engines' directories of layers and containers": Limit(amount=2),
    "server's memory, MB": MEMORY,
    "server's descriptors": Limit(amount=9),  # three for each connection to SQLite
    "worker's memory, MB": MEMORY,
    "worker's descriptors": Limit(amount=2),
    "worker's processes": Limit(),
    "temporary files of the runs": Limit(),
    "files in Prefect's home": Limit(amount=2),  # the directories of what it keeps
    "database rows per run": Limit(share=0.1),
    "runs kept beyond retention": Limit(),
}


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with an upgrade.

    Attributes:
        end: type of the state that the run has to end in.
        before, meanwhile: what is done before the run, and once its servers load.
        bad: whether its image is bad.
        recovered: whether a run of pd-recover has to follow.
    """

    name: str
    end: str = "COMPLETED"
    before: Callable[["Soak"], None] | None = None
    meanwhile: Callable[["Soak", str], None] | None = None
    bad: bool = False
    recovered: bool = False


@dataclass(frozen=True)
class Upgrade:
    """One upgrade: what went wrong on purpose, and how it ended.

    Attributes:
        seconds: from the request to the last look at what the run, or a recovery, left.
        down: the client's longest time without a completion, in s.
        problem: what is not as it has to be; empty if all is well.
    """

    number: int
    fault: str
    seconds: float
    down: float
    problem: str
    figures: Mapping[str, float]


class Soak:
    """A service on a lab, its Prefect server and its worker."""

    def __init__(self, service: LabService, prefect: PrefectServer, client: Client) -> None:
        self.service = service
        self.prefect = prefect
        self._client = client
        self._good = [service.push(service.tag(n), {"/etc/soak": str(n)}) for n in (1, 2)]
        self._bad = service.push_bad(service.tag(3), crash_after=0.3)
        self._serving = ""
        self._deployment = prefect.ask("GET", f"deployments/name/pd-deploy/{DEPLOYMENT}")["id"]

    def bring_up(self) -> None:
        """Deploy for the first time, before there is a client.

        Raises:
            RuntimeError: the run fails.
        """
        ended = self._ended(self._start(self._good[0]))
        if ended["state_type"] != "COMPLETED":
            raise RuntimeError(f"the first run ended so: {ended['state']['message']}")
        self._serving = self._good[0]

    def upgrade(self, number: int, fault: Fault | None) -> Upgrade:
        """Upgrade the service to the other image; look at what serves then."""
        self._client.gap, begin = 0.0, time.monotonic()
        other, figures = self._good[self._serving == self._good[0]], dict[str, float]()
        try:
            problem = self._upgrade(number, fault, other)
            if not (fault or problem):
                figures = self._figures()
        except (LabError, RuntimeError, LookupError, OSError, *OF_OTHERS) as error:
            problem = f"{type(error).__name__}: {error}"
        return Upgrade(
            number,
            fault.name if fault else "",
            time.monotonic() - begin,
            self._client.gap,
            problem,
            figures,
        )

    def _upgrade(self, number: int, fault: Fault | None, image: str) -> str:
        fault = fault or Fault("none")
        self.service.change(settings={"all": {"environment": {"SOAK": str(number)}}})
        if fault.before:
            fault.before(self)
        if fault.meanwhile:
            self.service.faults("d0", load_seconds=LOADING_S)
        recoveries = len(self._runs_of("pd-recover"))
        epoch = self._epochs()
        run = self._start(self._bad if fault.bad else image)
        if fault.meanwhile:
            self._wait("d0 of a new generation", lambda: self._epochs() - epoch)
            self.service.faults("d0")
            fault.meanwhile(self, run)
        ended = self._ended(run)
        if fault.recovered:
            self._wait("pd-recover", lambda: len(self._ended_of("pd-recover")) > recoveries)
        if ended["state_type"] == "COMPLETED":
            self._serving = image
        self._wait("the client to be served", self.service.completes)
        message = f"{ended['state']['name']}: {ended['state']['message']}"
        if ended["state_type"] != fault.end:
            return f"expected {fault.end}, found {message}"
        return self._unlike_what_serves()

    def _unlike_what_serves(self) -> str:
        running = self.service.containers(running=True)
        images = {c["Config"]["Labels"]["pd-deploy.image"] for c in running.values()}
        tag = self._serving.rpartition(":")[2]
        tags = {image.rpartition(":")[2] for image in images}
        if set(running) != INSTANCES or tags != {tag}:
            return f"expected all of {tag} to run, found {sorted(running)} of {sorted(tags)}"
        return ""

    def _epochs(self) -> set[str]:
        running = self.service.containers(running=True)
        labels = [c["Config"]["Labels"] for name, c in running.items() if name == "d0"]
        return {label["pd-deploy.epoch"] for label in labels}

    def _start(self, image: str) -> str:
        parameters = {"file": self.service.file, "image": image}
        # A request that is sent again starts no second run.
        body = {"parameters": parameters, "idempotency_key": str(uuid4())}
        created = self.prefect.ask("POST", f"deployments/{self._deployment}/create_flow_run", body)
        return str(created["id"])

    def _ended(self, run: str) -> dict[str, Any]:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while True:
            found: dict[str, Any] = self.prefect.ask("GET", f"flow_runs/{run}")
            if found["state_type"] in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"):
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"run {run} is {found['state_type']} after {RUN_TIMEOUT_S} s")
            time.sleep(POLL_S)

    def _runs_of(self, flow: str) -> list[dict[str, Any]]:
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 200}
        runs: list[dict[str, Any]] = self.prefect.ask("POST", "flow_runs/filter", body)
        return runs

    def _ended_of(self, flow: str) -> list[dict[str, Any]]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        return [run for run in self._runs_of(flow) if run["state_type"] in ended]

    def _wait(self, event: str, condition: Callable[[], object]) -> None:
        wait_until(event, lambda: bool(condition()), STEP_TIMEOUT_S)

    def _figures(self) -> dict[str, float]:
        self._wait("the run's processes to end", lambda: len(_group(self._pid(WORKER))) <= 1)
        hosts = list(self.service.lab.hosts.values())
        database = self.prefect.home / "prefect.db"
        runs = _rows(database, "SELECT count(*) FROM flow_run")
        kept, given_up = (_files(self.prefect.home / name) for name in ("storage", "dlq"))
        oldest = datetime.now(UTC) - RETENTION - timedelta(seconds=3 * VACUUM_S)
        late = f"SELECT count(*) FROM flow_run WHERE end_time < '{oldest:%Y-%m-%d %H:%M:%S}'"  # noqa: S608

        def counted(script: str) -> float:
            return sum(float(host.run(["sh", "-c", script]).stdout) for host in hosts)

        return {
            "containers on the hosts": counted("docker ps -aq | wc -l"),
            "images on the hosts": counted("docker images -aq | wc -l"),
            "files of ours on the hosts": counted(f"find {STATE} {LOGS} | wc -l"),
            "record.json, bytes": counted(f"cat {STATE}/*/record.json | wc -c"),
            "temporary files on the hosts": counted("find /tmp /var/tmp -mindepth 1 | wc -l"),
            "processes on the hosts": counted("ls -d /proc/[0-9]* | wc -l"),
            "descriptors of the engines": counted("ls /proc/$(cat /run/docker.pid)/fd | wc -l"),
            "engines' directories of layers and containers": counted(
                "find /var/lib/docker -mindepth 2 -maxdepth 2 -type d | wc -l"
            ),
            "server's memory, MB": sum(map(_memory, _group(self._pid(SERVER)))),
            "server's descriptors": sum(map(_descriptors, _group(self._pid(SERVER)))),
            "worker's memory, MB": _memory(self._pid(WORKER)),
            "worker's descriptors": _descriptors(self._pid(WORKER)),
            "worker's processes": len(_group(self._pid(WORKER))),
            "temporary files of the runs": _files(Path(self.prefect.env["TMPDIR"])),
            "files in Prefect's home": _files(self.prefect.home) - kept - given_up,
            # Prefect writes the exception of each failed run there, and never removes one.
            "exceptions of failed runs that Prefect keeps": kept,
            # Where SQLite is locked for a moment, Prefect gives an event up, and keeps it there.
            "events that Prefect has given up": given_up,
            "runs in the database": runs,
            "database rows": sum(_all_rows(database)),
            "database rows per run": sum(_all_rows(database)) / max(runs, 1),
            "runs kept beyond retention": _rows(database, late),
        }

    def _pid(self, name: str) -> int:
        return self.prefect.pid(name)


def _kill_a_serving_server(soak: Soak) -> None:
    soak.service.kill("p1")


def _kill_a_loading_server(soak: Soak, _: str) -> None:
    soak.service.kill("d0")


def _drop_ssh(soak: Soak, _: str) -> None:
    for host in soak.service.lab.hosts.values():
        host.drop_ssh()


def _pull_a_cable(soak: Soak, _: str) -> None:
    host = soak.service.lab.hosts["b"]
    host.cut()
    time.sleep(2)  # this long it is away
    host.mend()


def _kill_the_run(_: Soak, run: str) -> None:
    wanted = f"PREFECT__FLOW_RUN_ID={run}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (directory / "environ").read_bytes():
                os.kill(int(directory.name), signal.SIGKILL)
                return
        except OSError:
            continue
    raise RuntimeError(f"no process of run {run}")


FAULTS = (
    Fault("a serving server is killed", before=_kill_a_serving_server),
    Fault("SSH connections are dropped", meanwhile=_drop_ssh),
    Fault("the image is bad", end="FAILED", bad=True),
    Fault("a host is unplugged for 2 s", meanwhile=_pull_a_cable),
    Fault("a server is killed while it loads", end="FAILED", meanwhile=_kill_a_loading_server),
    Fault("the run is killed", end="CRASHED", meanwhile=_kill_the_run, recovered=True),
)


def soak(
    count: int, minutes: float, name: str, subnet: str, every: int, told: Callable[[Upgrade], None]
) -> list[Upgrade]:
    """Upgrade so many times, or for so long."""
    deadline = time.monotonic() + minutes * 60
    upgrades: list[Upgrade] = []
    with on_lab(name, subnet) as running:
        for number in range(1, count + 1):
            if time.monotonic() > deadline:
                break
            cycle, rest = divmod(number, every)
            fault = None if rest else FAULTS[(cycle - 1) % len(FAULTS)]
            upgrades.append(running.upgrade(number, fault))
            told(upgrades[-1])
    return upgrades


@contextmanager
def on_lab(name: str, subnet: str) -> Iterator[Soak]:
    """Give the service on a lab of its own, serving; take all down afterwards in any case."""
    try:
        lab = Lab.up(name, subnet)
        with TemporaryDirectory(prefix="pd-soak-") as path:
            directory = Path(path)
            temporary = directory / "tmp"
            temporary.mkdir()
            own = {"TMPDIR": str(temporary), DIRECTORIES: path}
            with PrefectServer(directory, SETTINGS | own) as prefect:
                file = write_file(lab, directory / "soak-3p1d.yaml", ssh={"credentials": BLOCK})
                service = LabService(file, lab)
                service.clean()
                _prepare(prefect, service)
                client = Client(service.url, pause=PAUSE_S)
                running = Soak(service, prefect, client)
                running.bring_up()
                with client:
                    yield running
    finally:
        take_down(name)


def _prepare(prefect: PrefectServer, service: LabService) -> None:
    lab = service.lab
    prefect.run("pd-deploy", "credentials", "ssh", BLOCK, "--private-key", str(lab.ssh_key),
                "--known-hosts", str(lab.known_hosts))  # fmt: skip
    prefect.start_worker(POOL)
    prefect.run("prefect", *DEPLOY_LAB)
    for deployment in (f"pd-deploy/{DEPLOYMENT}", f"pd-recover/{DEPLOYMENT}-recover"):
        identity = prefect.ask("GET", f"deployments/name/{deployment}")["id"]
        body = {"parameters": {"file": service.file}}
        prefect.ask("PATCH", f"deployments/{identity}", body)


def main() -> int:
    """Run the command; return 0 if no upgrade failed and nothing grew."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="upgrades (default: 200)")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="end after so many")
    parser.add_argument("--fault-every", type=int, default=FAULT_EVERY, metavar="N")
    parser.add_argument("--lab", default=NAME, help=f"name of the lab (default: {NAME})")
    parser.add_argument("--subnet", default=SUBNET, help=f"of the lab (default: {SUBNET})")
    parser.add_argument("--samples", type=Path, help="also write each upgrade here, as JSON lines")
    options = parser.parse_args()
    done: list[Upgrade] = []

    def told(upgrade: Upgrade) -> None:
        done.append(upgrade)
        say(_line(upgrade))
        if options.samples:
            with options.samples.open("a") as lines:
                print(json.dumps(dataclasses.asdict(upgrade)), file=lines)

    try:
        given = (options.count, options.minutes, options.lab, options.subnet, options.fault_every)
        measured("soak", lambda: soak(*given, told), httpx.HTTPError)
    finally:
        print(report(done))
    return int(failed(done))


def failed(upgrades: list[Upgrade]) -> bool:
    """Tell whether an upgrade failed, or anything grew."""
    return any(u.problem for u in upgrades) or any(f.grew for f in comparisons(upgrades))


def comparisons(upgrades: list[Upgrade]) -> list[Comparison]:
    """Compare the figures of the first tenth of the upgrades with those of the last.

    The first few do not count: hosts fill up with the generations that are kept.
    """
    counted = [upgrade for upgrade in upgrades[KEPT:] if upgrade.figures]
    told = [{"seconds": u.seconds, "down, s": u.down, **u.figures} for u in counted]
    return compare(told, LIMITS)


def report(upgrades: list[Upgrade]) -> str:
    """Format what came of it as a table for people."""
    wrong = [upgrade for upgrade in upgrades if upgrade.problem]
    faults = [upgrade for upgrade in upgrades if upgrade.fault]
    compared = comparisons(upgrades)
    heading = f"{'':50}{'early 10 %':>12}{'last 10 %':>12}{'allowed':>12}"
    lines = [
        f"{len(upgrades)} upgrades, {len(faults)} of them with a fault: {len(wrong)} failed",
        *(f"  {_line(upgrade)}" for upgrade in wrong),
        "",
        heading if compared else "too few upgrades without a fault: nothing to compare",
    ]
    for figure in compared:
        allowed = "" if figure.allowed is None else f"{figure.allowed:.1f}"
        verdict = "  GREW" if figure.grew else ""
        lines.append(
            f"{figure.name:50}{figure.first:12.1f}{figure.last:12.1f}{allowed:>12}{verdict}"
        )
    return "\n".join(lines)


def _line(upgrade: Upgrade) -> str:
    what = f", {upgrade.fault}" if upgrade.fault else ""
    ended = f"FAILED: {upgrade.problem}" if upgrade.problem else "as it has to be"
    return (
        f"upgrade {upgrade.number}{what}: {upgrade.seconds:.1f} s, "
        f"down for {upgrade.down:.1f} s, {ended}"
    )


def _group(leader: int) -> list[int]:
    """List the processes of a group that are alive."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def _memory(pid: int) -> float:
    """Return the resident memory of a process, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _files(directory: Path) -> int:
    # Not rglob, which fails where a directory goes away meanwhile, as those of runs do.
    return sum(len(names) + len(files) for _, names, files in os.walk(directory))


def _rows(database: Path, query: str) -> int:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        return int(connection.execute(query).fetchone()[0])


def _all_rows(database: Path) -> list[int]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        names = [name for (name,) in tables]
        return [
            int(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])  # noqa: S608
            for name in names
        ]


if __name__ == "__main__":
    sys.exit(main())
