"""Processes of this machine, told apart for longer than pids are: those are used again."""

import os
from pathlib import Path


def machine() -> str:
    """Name this machine, its boot and the namespace of its pids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return f"{os.uname().nodename} {boot.read_text().strip()} {namespace.readlink()}"


def started(pid: int) -> str:
    """Say when a process started, in clock ticks since boot; "" if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
