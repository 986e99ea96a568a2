"""What the lab requires of this machine. Runs before anything is installed: only the standard
library is imported.

Exits with 1 and one message that lists everything that is missing.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

PORT = int(os.environ.get("PD_DEMO_PORT", "4200"))


def missing(*, port: int | None) -> list[str]:
    """List what is missing, for people to read.

    Args:
        port: the Prefect server's port, if one is to be started.
    """
    lacking = []
    if sys.version_info[:2] != (3, 11):
        lacking.append(f"Python 3.11 (found {sys.version.split()[0]})")
    if os.geteuid() != 0:
        lacking.append("root, for network namespaces and Docker engines (try: sudo make ...)")
    if not shutil.which("apt-get") or not Path("/etc/debian_version").exists():
        lacking.append("Debian 12 (the lab's hosts and image are made of its packages)")
    if port is not None and not _free(port):
        lacking.append(
            f"a free TCP port {port} for the Prefect server (another program listens there; "
            "choose another port with PD_DEMO_PORT=...)"
        )
    return lacking


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wanted_port() -> int | None:
    running = Path(".demo/processes.json").exists()
    return None if running or "--no-server" in sys.argv else PORT


if __name__ == "__main__":
    lacking = missing(port=_wanted_port())
    if lacking:
        sys.exit("Nothing was changed. This machine lacks:\n- " + "\n- ".join(lacking))
