"""`python -m demo up|vllm|down`: lab, Prefect server, worker, and a real deployment run.

Every command that a user would type is shown before it runs.
"""

import argparse
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.preconditions import PORT
from demo.processes import Processes

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
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
}
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
    if not processes.running("server"):
        host, port = "127.0.0.1", str(PORT)
        processes.start(
            "server", [f"{BIN}/prefect", "server", "start", "--host", host, "--port", port], ENV
        )
    run("pd-deploy", "lab", "up")
    if prepare:
        run(*prepare)
    # The first start also creates the server's database; a busy machine needs a minute for it.
    processes.until("server", answers, 120)
    run("prefect", "work-pool", "create", "pd-pool", "--type", "process", "--overwrite", quiet=True)
    if not processes.running("worker"):
        processes.start("worker", [f"{BIN}/prefect", "worker", "start", "--pool", "pd-pool"], ENV)
    run("pd-deploy", "credentials", "ssh", "pd-lab-ssh", "--private-key", f"{LAB}/id_ed25519",
        "--known-hosts", f"{LAB}/known_hosts")  # fmt: skip
    run("prefect", "--no-prompt", "deploy", "--all", quiet=True)
    output = run("prefect", "deployment", "run", f"pd-deploy/{deployment}", quiet=True)
    flow_run = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", output)
    if not flow_run:
        raise RuntimeError(f"expected the id of a flow run, found:\n{output}")
    followed = subprocess.run(["pd-deploy", "follow", flow_run[0]], env=ENV, check=False)
    print(f"\nLook around: http://127.0.0.1:{PORT}/runs/flow-run/{flow_run[0]}")
    print("Run again: the same command      Remove everything: make demo-down")
    return followed.returncode


def down(*, keep_lab: bool = False) -> int:
    """Remove everything, except the lab's cache of Debian packages and images.

    Args:
        keep_lab: keep the lab, too, which somebody had up before.
    """
    ended = processes.stop_all()
    if ended:
        print(f"stopped Prefect {' and '.join(ended)}")
    shutil.rmtree(HOME, ignore_errors=True)
    if keep_lab:
        print("kept the lab, which was up before; `make demo-down` removes it")
        return 0
    run("pd-deploy", "lab", "down")
    print("kept packages and images for the next time; `pd-deploy lab down --purge` removes them")
    return 0


def run(*argv: str, quiet: bool = False) -> str:
    """Print and run a command; if `quiet`, return its output instead of showing it."""
    print(f"$ {shlex.join(argv)}", flush=True)
    pipe, both = (subprocess.PIPE, subprocess.STDOUT) if quiet else (None, None)
    done = subprocess.run(
        argv,
        env=ENV,
        cwd=ROOT,
        stdout=pipe,
        stderr=both,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout or "", end="")
        raise RuntimeError(f"`{shlex.join(argv)}` failed with exit code {done.returncode}")
    return done.stdout or ""


def answers() -> bool:
    """Tell whether the Prefect server is up."""
    try:
        with urllib.request.urlopen(f"{API}/health", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> int:
    """Run the command; take down what a failed or interrupted start left."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("verb", choices=["up", "vllm", "down"])
    parser.add_argument("--prefills", type=int, choices=[1, 3], default=3)
    arguments = parser.parse_args()
    fresh, had_lab = False, True
    try:
        with alone():
            fresh, had_lab = not processes.running("server"), (LAB / "lab.json").exists()
            if arguments.verb == "down":
                return down()
            if arguments.verb == "vllm":
                return up(f"lab-vllm-{arguments.prefills}p1d", "pd-deploy", "lab", "vllm")
            return up("lab-qwq-3p1d")
    except (RuntimeError, KeyboardInterrupt) as error:
        print(f"demo: {str(error) or 'interrupted'}", file=sys.stderr)
        if fresh:
            down(keep_lab=had_lab)
        return 1


if __name__ == "__main__":
    sys.exit(main())
