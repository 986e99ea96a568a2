"""Who uses which NPU, and which are faulty, from `npu-smi info` (contract section 7.2). Pure."""

import itertools
import re
from collections.abc import Iterable, Sequence

from pd_deploy.engines.ascend import cells, health_of, query_at_once
from pd_deploy.errors import FactsError

COMMAND = ["npu-smi", "info"]
HBM_IDLE_MB = 5120
"""An idle device was seen to use 2.8 to 3.5 GB; one that uses more than this is occupied."""

FIT = ("OK", "Warning")
"""A device with a warning works."""
_PORT = "network port of device"
HEALTH = f"npu-smi info; {query_at_once('link', _PORT)}"

_CHIP = re.compile(r"[0-9A-F]{4}:[0-9A-F]{2}:[0-9A-F]{2}\.[0-9A-F]")
_HBM = re.compile(r"(\d+)\s*/\s*\d+\s*$")


def parse_users(output: str, devices: Sequence[int], *, host: str) -> dict[int, str]:
    """Parse which of the devices are in use, each with its user.

    Raises:
        FactsError: devices that `npu-smi info` does not list.
    """
    ids, users = _read([cells(line) for line in output.splitlines()])
    missing = [device for device in devices if device not in ids.values()]
    if missing:
        raise FactsError(
            f"expected `npu-smi info` to list the devices {', '.join(map(str, missing))}, "
            f"found {', '.join(map(str, sorted(ids.values()))) or 'none'}",
            host=host,
            hint="look at the driver, or change `devices` in the deployment file",
        )
    return {device: users[device] for device in devices if device in users}


def health_command(devices: Iterable[int]) -> list[str]:
    """Return one command that prints the health of all devices and the state of their network
    ports, for `parse_faults`."""
    return ["sh", "-c", HEALTH, "npu-smi", *map(str, devices)]


def parse_faults(output: str, devices: Sequence[int]) -> dict[int, str]:
    """Parse which of the devices are out of order, each with what is said of it."""
    table, *ports = output.split(f"{_PORT} ")
    health = health_of(table)
    faults: dict[int, list[str]] = {
        device: [f"npu-smi says {health[device]}"] if health.get(device, "OK") not in FIT else []
        for device in devices
    }
    for port in ports:
        number, _, state = port.partition("\n")
        if re.search(r"link status:\s*DOWN", state) and number.isdecimal():
            faults[int(number)].append("its network port is DOWN")
    return {device: ", ".join(texts) for device, texts in faults.items() if texts}


def _read(rows: Sequence[list[str]]) -> tuple[dict[tuple[int, int], int], dict[int, str]]:
    """Read (NPU, chip) → device id, and device id → user."""
    ids: dict[tuple[int, int], int] = {}
    users: dict[int, str] = {}
    for above, row in itertools.pairwise(rows):
        if len(row) >= 3 and _CHIP.fullmatch(row[1]) and above:
            npu, chip = int(above[0].split()[0]), row[0].split()
            device = int(chip[1]) if len(chip) > 1 else npu
            ids[npu, int(chip[0])] = device
            used = _HBM.search(row[-1])
            if used and int(used[1]) > HBM_IDLE_MB:
                users[device] = f"somebody ({used[1]} MB of its memory are in use)"
    for row in rows:
        if len(row) >= 3 and row[1].isdecimal() and re.fullmatch(r"\d+\s+\d+", row[0]):
            npu, chip_id = map(int, row[0].split())
            if (npu, chip_id) in ids:
                users[ids[npu, chip_id]] = f"{row[2]} (pid {row[1]})"
    return ids, users
