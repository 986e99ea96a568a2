"""A service over many hosts, as large ones are: each prefill has a host of its own, and one decode
spans the others. Pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAB = Path(__file__).resolve().parent.parent / "deployments/lab-qwq-3p1d.yaml"
MOST_PREFILLS = 32  # omni-infer's proxy chooses none beyond these
# On hardware a decode has all 16 devices of a host, with an API server for each. These are enough
# to see several, and few enough for a machine that simulates all the hosts.
DECODE_DEVICES = 2


def prefills(hosts: int) -> int:
    """Choose how many of so many hosts have a prefill: three of four, as far as the engine can."""
    return min(hosts - max(1, hosts // 4), MOST_PREFILLS) or 1


def described(hosts: int) -> str:
    """Say what a service on so many hosts is."""
    prefill, decode = prefills(hosts), hosts - prefills(hosts) or 1
    each = "1 prefill" if prefill == 1 else f"{prefill} prefills, each on a host of its own,"
    return f"{each} and a decode over {decode} {'host' if decode == 1 else 'hosts'}"


def document(hosts: Mapping[str, str], decode_devices: int = DECODE_DEVICES) -> dict[str, Any]:
    """Make the deployment file of a service on hosts of the lab: 18P1D on 24 of them.

    Args:
        hosts: name → address.
        decode_devices: of each of decode's hosts; as many API servers run there.
    """
    names = list(hosts)
    prefill = prefills(len(names))
    decode = names[prefill:] or names
    # On a single host the two share the devices, and a decode counts its own from 0.
    devices = "0-15" if len(names) > 1 else f"{decode_devices}-15"
    return {
        "extends": str(LAB),
        "name": "lab-fleet",
        "profile": "deepseek-r1-a3-2p1d",
        "model": {"served_name": "deepseek"},
        "hosts": {"a": None, "b": None} | dict(hosts),
        "prefill": {"p0": None, "p1": None, "p2": None}
        | {f"p{i}": {"host": names[i], "devices": devices} for i in range(prefill)},
        "decode": {"d0": {"host": None, "hosts": decode, "devices": f"0-{decode_devices - 1}"}},
        "proxy": {"c0": {"host": names[0], "port": 7000}},
    }
