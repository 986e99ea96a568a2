"""What the lab needs from the machine: commands, processes, waiting, packages."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pd_deploy.lab.errors import LabError

# command -> Debian package that holds it
COMMANDS = {
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
}
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(argv: Sequence[str]) -> str:
    """Run a command on the machine and return its output.

    Raises:
        LabError: it failed; the message has the command and its output.
    """
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=clean_environment()
    )
    if done.returncode:
        output = (done.stderr or done.stdout).strip()
        raise LabError(f"`{' '.join(argv)}` failed (exit {done.returncode}): {output}")
    return done.stdout


def clean_environment() -> dict[str, str]:
    """Make an environment for the machine's tools: English messages, system commands on PATH."""
    proxies = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    return {"PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8", "HOME": "/root", **proxies}


def wait_until(
    event: str,
    ready: Callable[[], bool],
    timeout: float,
    explain: Callable[[], str] = lambda: "",
) -> None:
    """Wait at most ``timeout`` seconds until ``ready()``.

    Raises:
        LabError: it timed out; the message names ``event`` and ends with ``explain()``.
    """
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise LabError(
                f"timed out after {timeout:g} s waiting for {event}. {explain()}".rstrip()
            )
        time.sleep(0.03)


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it is gone or a zombie.

    Together with the process id it identifies a process for good, although ids are reused.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def require_root() -> None:
    """Require root, which namespaces and mounts need.

    Raises:
        LabError: the user is not root.
    """
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces and mounts, so it needs root: use sudo")


def install_missing_packages(
    say: Callable[[str], None], commands: Mapping[str, str] = COMMANDS
) -> None:
    """Install the Debian packages of the commands that the machine lacks, by default the lab's.

    Raises:
        LabError: the machine has no apt-get, or apt-get failed.
    """
    missing = sorted(
        {package for name, package in commands.items() if not shutil.which(name, path=SEARCH_PATH)}
    )
    if not missing:
        return
    names = " ".join(missing)
    if not shutil.which("apt-get", path=SEARCH_PATH):
        raise LabError(f"this machine lacks {names} and has no apt-get; install them yourself")
    say(f"installing {names}")
    # Another apt-get, such as the nightly one, may be running.
    patiently = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    run([*patiently, "update"])
    run([*patiently, "install", "-y", "--no-install-recommends", *missing])


def mode_of(content: bytes) -> int:
    """Derive a file's mode from its content: scripts (``#!``) and programs (ELF) are executable.

    An installed package may have lost the modes that its files have in the repository.
    """
    return 0o755 if content.startswith((b"#!", b"\x7fELF")) else 0o644


def mounts_below(directory: Path) -> list[str]:
    """List the machine's mount points at or below a directory."""
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in table]
    return [point for point in points if Path(point).is_relative_to(directory)]


def remove_tree(directory: Path) -> bool:
    """Delete a directory that the lab made; return False if there was none.

    Raises:
        LabError: something is mounted in it, so deleting could affect files elsewhere.
    """
    if not directory.exists():
        return False
    if mounted := mounts_below(directory):
        raise LabError(f"not deleting {directory}: unmount {', '.join(mounted)} first")
    shutil.rmtree(directory)
    return True
