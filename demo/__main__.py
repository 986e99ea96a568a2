"""`python -m demo up|vllm|fleet|ha|down`: lab, Prefect server, worker, and a real deployment run.

Every command that a user would type is shown before it runs.
"""

import argparse
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from demo import fleet, services
from demo.preconditions import PORT
from demo.processes import Processes
from demo.production import MACHINES, Production
from pd_deploy.cli import one_server
from pd_deploy.cli.local_http import is_healthy
from pd_deploy.lab import Lab, LabError

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".demo"
BIN = Path(sys.executable).parent
LAB = Path("/var/lib/pd-deploy-lab/pdlab")
API = f"http://127.0.0.1:{PORT}/api"
ENV = os.environ | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PREFECT_HOME": str(HOME / "prefect"),
    "PREFECT_API_URL": API,
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    **one_server.SETTINGS,
}
PRODUCTION = HOME / "production"  # leads to what `ha` made
POOL = "site-a"
processes = Processes(HOME)


@contextmanager
def alone() -> Iterator[None]:
    """Keep other demos of this checkout from running at the same time.

    Raises:
        RuntimeError: another one is running.
    """
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError("another demo is running here; wait until it ends") from error
        yield


def up(deployment: str, *prepare: str) -> int:
    """Start the lab, Prefect and a worker, run the deployment; return 0 if it completed.

    Args:
        prepare: a command to run before the deployment, once the lab is up.
    """
    start_server()
    run("pd-deploy", "lab", "up")
    if prepare:
        run(*prepare)
    # The first start also creates the server's database; a busy machine needs a minute for it.
    processes.until("server", lambda: is_healthy(API), 120)
    run("prefect", "work-pool", "create", "pd-pool", "--type", "process", "--overwrite", quiet=True)
    if not processes.running("worker"):
        processes.start("worker", [f"{BIN}/prefect", "worker", "start", "--pool", "pd-pool"], ENV)
    save_key()
    run("prefect", *services.DEPLOY_LAB, quiet=True)
    flow_run = _start_run(ENV, deployment)
    code = _follow(flow_run, ENV)
    print(f"\nLook around: http://127.0.0.1:{PORT}/runs/flow-run/{flow_run}")
    print(next_commands(ROOT / "deployments" / f"{deployment}.yaml"))
    return code


def next_commands(file: Path) -> str:
    """Say what to type next, with the environment that it needs."""
    shown = file.relative_to(ROOT)
    settings = {name: ENV[name] for name in ("PREFECT_HOME", "PREFECT_API_URL")}
    exports = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    return "\n".join(
        [
            "Type next, in this directory:",
            f"  export PATH={shlex.quote(str(BIN))}:$PATH {' '.join(exports)}",
            f"  pd-deploy status {shown} --watch     # what serves, and how each part of it is",
            f"  pd-deploy releases {shown}           # what was deployed, and what became of it",
            f"  pd-deploy diff {shown}               # what the file, changed, would change",
            f"  pd-deploy deploy {shown}             # do it",
            "  pd-deploy lab push 20250723_27       # a newer build of the image",
            f"  pd-deploy deploy {shown} --image 20250723_27     # an upgrade to it",
            f"  pd-deploy rollback {shown}           # go back",
            "  pd-deploy lab reboot b               # a host fails; `status` shows it",
            f"  pd-deploy recover {shown}            # bring all up again",
            "Run again: the same command      Remove everything: make demo-down",
        ]
    )


def _start_run(env: Mapping[str, str], deployment: str = services.EXAMPLE) -> str:
    output = run("prefect", "deployment", "run", f"pd-deploy/{deployment}", quiet=True, env=env)
    flow_run = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", output)
    if not flow_run:
        raise RuntimeError(f"expected the id of a flow run, found:\n{output}")
    return flow_run[0]


def _follow(flow_run: str, env: Mapping[str, str]) -> int:
    return subprocess.run(["pd-deploy", "follow", flow_run], env=env, check=False).returncode


def high_availability() -> int:
    """Set Prefect up as in production, and kill half of it during an upgrade.

    Returns:
        0 if the upgrade completed nevertheless.
    """
    if processes.running("server"):
        raise RuntimeError("the other demo is up; run `make demo-down` first")
    run("pd-deploy", "lab", "up")
    if processes.running("nginx"):
        production = Production.load(processes, PRODUCTION.resolve())
    else:
        print("starting PostgreSQL, Redis, nginx, two Prefect servers and their services")
        production = Production.create(processes, PORT)
        HOME.mkdir(mode=0o700, exist_ok=True)
        PRODUCTION.unlink(missing_ok=True)
        PRODUCTION.symlink_to(production.directory)
        production.start()
        _create_services(production)
    for number in MACHINES:
        if not processes.running(f"server-{number}"):
            production.start_server(number)
        if not processes.running(f"worker-{number}"):
            production.start_worker(f"worker-{number}", POOL)
    env = production.client_env("operator") | services.GIT
    directory = production.directory / "services"
    first = _start_run(env)
    if code := _follow(first, env):
        return code
    print("\nAn upgrade, during which a server and the run's worker die, and PostgreSQL restarts:")
    changed = {"settings": {"all": {"environment": {"DEMO": first}}}}
    services.change(directory, changed)
    run("git", "commit", "-q", "-a", "-m", "An upgrade", env=env, cwd=directory)
    run("git", "push", "-q", env=env, cwd=directory)
    second = _start_run(env)
    follower = subprocess.Popen(["pd-deploy", "follow", second], env=env)
    production.until("nginx", lambda: production.has_begun(second))
    worker = production.worker_of(second) or ""
    for name, kill in (
        ("server-1", processes.kill),
        (worker, lambda name: processes.kill(name, children=False)),
        ("postgres", processes.kill),
    ):
        print(f"$ kill -9 {name}", flush=True)
        kill(name)
    production.start_postgres()
    try:
        code = follower.wait()
    except KeyboardInterrupt:
        follower.send_signal(signal.SIGINT)
        raise
    print(f"\nLook around: {production.url}/runs/flow-run/{second}")
    print(f"The UI asks for the login in {production.directory}/login")
    print(
        "Start what died, and do it again: the same command      Remove everything: make demo-down"
    )
    return code


def _create_services(production: Production) -> None:
    directory = production.directory / "services"
    directory.mkdir()
    env = production.client_env("operator") | services.GIT

    def command(*argv: str) -> str:
        return run(*argv, quiet=True, env=env, cwd=directory)

    credentials = ("pd-lab-ssh", LAB / "id_ed25519", LAB / "known_hosts")
    services.create(command, directory, POOL, credentials, {})


def up_fleet(hosts: int) -> int:
    """Start a lab of so many hosts and Prefect, deploy a service over all of them from here; return
    0 if it completed."""
    start_server()
    run("pd-deploy", "lab", "up", "--hosts", str(hosts))
    processes.until("server", lambda: is_healthy(API), 120)
    save_key()
    addresses = {name: host.address for name, host in Lab.load().hosts.items()}
    file = HOME / "lab-fleet.yaml"
    file.write_text(yaml.safe_dump(fleet.document(addresses), sort_keys=False))
    print(f"wrote {file}: {fleet.described(hosts)}")
    command = ["pd-deploy", "deploy", str(file)]
    print(f"$ {shlex.join(command)}", flush=True)
    deployed = subprocess.run(command, env=ENV, cwd=ROOT, check=False)
    print(f"\nLook around: http://127.0.0.1:{PORT}/runs")
    print(next_commands(file))
    return deployed.returncode


def start_server() -> None:
    """Start the Prefect server unless it runs."""
    if not processes.running("server"):
        host, port = "127.0.0.1", str(PORT)
        processes.start(
            "server", [f"{BIN}/prefect", "server", "start", "--host", host, "--port", port], ENV
        )


def save_key() -> None:
    """Save the key of the lab's hosts as a block."""
    run("pd-deploy", "credentials", "ssh", "pd-lab-ssh", "--private-key", f"{LAB}/id_ed25519",
        "--known-hosts", f"{LAB}/known_hosts")  # fmt: skip


def down(*, keep_lab: bool = False) -> int:
    """Remove everything, except the lab's cache of Debian packages and images.

    Args:
        keep_lab: keep the lab, too, which somebody had up before.
    """
    ended = processes.stop_all()
    if ended:
        print(f"stopped {', '.join(ended)}")
    if PRODUCTION.is_symlink():
        shutil.rmtree(PRODUCTION.resolve(), ignore_errors=True)
    shutil.rmtree(HOME, ignore_errors=True)
    if keep_lab:
        print("kept the lab, which was up before; `make demo-down` removes it")
        return 0
    run("pd-deploy", "lab", "down")
    print("kept packages and images for the next time; `pd-deploy lab down --purge` removes them")
    return 0


def run(*argv: str, quiet: bool = False, env: Mapping[str, str] = ENV, cwd: Path = ROOT) -> str:
    """Print and run a command; if `quiet`, return its output instead of showing it."""
    print(f"$ {shlex.join(argv)}", flush=True)
    pipe, both = (subprocess.PIPE, subprocess.STDOUT) if quiet else (None, None)
    done = subprocess.run(
        argv,
        env=env,
        cwd=cwd,
        stdout=pipe,
        stderr=both,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout or "", end="")
        raise RuntimeError(f"`{shlex.join(argv)}` failed with exit code {done.returncode}")
    return done.stdout or ""


def main() -> int:
    """Run the command; take down what a failed or interrupted start left."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("verb", choices=["up", "vllm", "fleet", "ha", "down"])
    parser.add_argument("--prefills", type=int, choices=[1, 3], default=3)
    parser.add_argument("--hosts", type=int, default=24)
    arguments = parser.parse_args()
    fresh, had_lab = False, True
    try:
        with alone():
            fresh = not processes.running("server") and not processes.running("nginx")
            had_lab = (LAB / "lab.json").exists()
            if arguments.verb == "down":
                return down()
            if arguments.verb == "vllm":
                return up(f"lab-vllm-{arguments.prefills}p1d", "pd-deploy", "lab", "vllm")
            if arguments.verb == "fleet":
                return up_fleet(arguments.hosts)
            if arguments.verb == "ha":
                return high_availability()
            return up(services.EXAMPLE)
    except (LabError, RuntimeError, KeyboardInterrupt) as error:
        print(f"demo: {str(error) or 'interrupted'}", file=sys.stderr)
        if fresh:
            down(keep_lab=had_lab)
        return 1


if __name__ == "__main__":
    sys.exit(main())
