"""What `npu-smi` and `hccn_tool` say of Ascend NPUs. Pure.

Their output differs with driver and hardware, so it is read leniently: tried with what drivers
from 23.0 to 25.5 print on A2 and A3, as people have shown it and as the driver's source has it.
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address

from pd_deploy.engines.device_report import Device, DeviceReport, Lost, Ping
from pd_deploy.hosts.batch import Batch, Lane, Printed, of

INFO = ["npu-smi", "info"]
DRIVER = ["cat", "/usr/local/Ascend/driver/version.info"]
FIRMWARE = ["cat", "/usr/local/Ascend/firmware/version.info"]
KEPT = ["cat", "/etc/hccn.conf"]

FIT: tuple[str, ...] = ("OK",)
WORKING: tuple[str, ...] = ("Warning",)

_CHIP = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]")
_SHOWN = 8


def query(device: int, item: str) -> list[str]:
    """Make the command that asks a device for something of its network."""
    return ["hccn_tool", "-i", str(device), f"-{item}", "-g"]


def query_at_once(item: str, heading: str) -> str:
    """Write a script that asks all devices that it is given for something of their network at the
    same time, and heads each answer with `heading` and the device's number.

    One after the other, a slow tool would take up to 16 times as long.
    """
    return (
        f'for i; do (said=$(hccn_tool -i "$i" -{item} -g 2>&1); '
        f'printf \'{heading} %s\\n%s\\n\' "$i" "$said") & done; wait'
    )


def lanes(devices: Sequence[int], *, full: bool) -> tuple[Lane, list[Lane]]:
    """List the commands for `parse`. `-tls` is the last of a device's, because it prints the most
    and what matters of it first."""
    items = ("link", "net_health", "ip", "gateway", "vnic", "tls") if full else ("link", "tls")
    of_each = [[query(device, item) for item in items] for device in devices]
    return ([INFO, DRIVER, FIRMWARE, KEPT] if devices else []), [*of_each]


def parse(batch: Batch, devices: Sequence[int], *, full: bool) -> DeviceReport:
    """Parse what the commands of `lanes` printed."""
    if not devices:
        return DeviceReport()
    info, kept = of(batch, INFO), dict(re.findall(r"^(\w+)=(\S*)", of(batch, KEPT).text, re.M))
    health, is_a3 = health_of(info.text), "Phy-ID" in info.text
    unread = _Unread(batch)
    if not health:
        unread.add(INFO, info)
    read: dict[int, Device] = {}
    for device in devices:
        values = {
            "link": unread.value(device, "link", r"link status:\s*(\w+)"),
            "tls": unread.value(device, "tls", r"switch\s*\[\s*([01])\s*\]"),
        }
        if full:
            values |= {
                "net_health": unread.value(device, "net_health", r"health status:\s*(\w[\w ]*)"),
                "address": unread.value(device, "ip", r"ipaddr:\s*([\d.]+)"),
                "netmask": unread.value(device, "ip", r"netmask:\s*([\d.]+)", tell=False),
                "gateway": unread.value(device, "gateway", r"gateway:?\s*([\d.]+)", tell=False),
            }
            if is_a3:
                vnic = unread.value(device, "vnic", r"vnic ipaddr:\s*([\d.]+)", tell=False)
                values["virtual_address"] = vnic
        stored = kept.get(f"address_{device}", "")
        read[device] = Device(health=health.get(device, ""), stored_address=stored, **values)
    versions = re.search(r"\bVersion:\s*(\S+)", info.text)
    return DeviceReport(
        driver=versions[1] if versions else "",
        installed_driver=_version(of(batch, DRIVER)),
        firmware=_version(of(batch, FIRMWARE)),
        has_super_node=is_a3,
        devices=read,
        unread=tuple(unread.told()),
    )


def further(devices: Sequence[int]) -> Lane:
    """List commands that tell more of devices, for a capture."""
    boards = [["npu-smi", "info", "-t", "board", "-i", str(npu)] for npu in range(8)]
    items = [query(device, item) for device in devices for item in ("lldp", "netdetect")]
    return [["npu-smi", "-v"], [*INFO, "-l"], [*INFO, "-m"], *boards, *items]


def ping_lanes(pings: Sequence[Ping]) -> list[Lane]:
    """List the commands of pings, those of a device one after the other."""
    of_device = itertools.groupby(sorted(pings, key=lambda p: p.device), lambda p: p.device)
    return [[_ping(ping) for ping in group] for _, group in of_device]


def lost(batch: Batch, pings: Sequence[Ping]) -> list[Lost]:
    """Parse which pings lost packets. Judged by the count: `0.00%` is in `100.00%`, too."""
    faults = []
    for ping in pings:
        printed = of(batch, _ping(ping))
        count = re.search(r"(\d+) packets transmitted, (\d+) received", printed.text)
        if count is None:
            faults.append(Lost(ping, printed=printed.shown))
        elif int(count[2]) < int(count[1]):
            faults.append(Lost(ping, int(count[1]), int(count[2])))
    return faults


def _ping(ping: Ping) -> list[str]:
    item = "hccs_ping" if ping.within else "ping"
    return [*query(ping.device, item), "address", ping.address]


class _Unread:
    """What devices printed that nobody understands, the same of several devices once."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._devices: dict[tuple[str, str], list[int]] = {}
        self._others: list[str] = []

    def value(self, device: int, item: str, pattern: str, *, tell: bool = True) -> str:
        """Return what a device says of something; note it if that can't be read."""
        printed = of(self._batch, query(device, item))
        match = re.search(pattern, printed.text)
        if match:
            return _valid(match[1].strip())
        if tell:
            self._devices.setdefault((item, printed.shown), []).append(device)
        return ""

    def add(self, argv: list[str], printed: Printed) -> None:
        """Note what a command printed."""
        self._others.append(f"`{shlex.join(argv)}` printed {printed.shown}")

    def told(self) -> Iterator[str]:
        """Yield all that was noted."""
        yield from self._others
        for (item, shown), devices in self._devices.items():
            listed = ", ".join(map(str, devices[:_SHOWN])) + (" …" if devices[_SHOWN:] else "")
            yield f"`hccn_tool -i N -{item} -g` printed {shown} for device {listed}"


def _valid(value: str) -> str:
    """Return a value; "" for an address that is none, such as 0.0.0.0."""
    if re.fullmatch(r"[\d.]+\.[\d.]+", value):
        try:
            return "" if IPv4Address(value).is_unspecified else value
        except ValueError:
            return ""
    return value


def _version(printed: Printed) -> str:
    match = re.search(r"^Version\s*=\s*(\S+)", printed.text, re.MULTILINE)
    return match[1] if match else ""


def health_of(table: str) -> dict[int, str]:
    """Parse the health of each device in the table of `npu-smi info`. A device is the second number
    of its row, which drivers call Phy-ID or Device, and the NPU where there is none."""
    health: dict[int, str] = {}
    for above, row in itertools.pairwise([cells(line) for line in table.splitlines()]):
        if len(row) >= 3 and _CHIP.fullmatch(row[1]) and len(above) >= 2 and above[0]:
            chip, npu = row[0].split(), above[0].split()[0]
            number = chip[1] if chip[1:] and chip[1].isdecimal() else npu
            if number.isdecimal():
                health[int(number)] = above[1]
    return health


def cells(line: str) -> list[str]:
    """Split a table row into its cells; none for a frame."""
    if not line.startswith("|"):
        return []
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
