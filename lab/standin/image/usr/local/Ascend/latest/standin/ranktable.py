"""Ranktable files: shape, types and how the engine reads them (contract 3.2, 3.3)."""

import hashlib
import ipaddress
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from standin.rules import Refusal


@dataclass(frozen=True)
class Device:
    """One NPU die: physical id, RoCE address, rank inside its pod."""

    device_id: int
    device_ip: str
    rank_id: int


@dataclass(frozen=True)
class Server:
    """One host of a pod."""

    server_ip: str
    devices: tuple[Device, ...]

    @property
    def device_ids(self) -> list[int]:
        """Physical ids in rank order."""
        return [device.device_id for device in self.devices]


@dataclass(frozen=True)
class Group:
    """One pod: its servers, and the cluster id of its first device."""

    servers: tuple[Server, ...]
    cluster_id: int = 0

    @property
    def ranks(self) -> list[tuple[str, int]]:
        """List (server ip, physical device id) of every world rank."""
        return [(server.server_ip, i) for server in self.servers for i in server.device_ids]


def read_local(path: str) -> Group:
    """Read the instance's own file; the count is the string "1", or an integer in a merged file."""
    table = _load(path)
    servers = _servers(table, path)
    count = "1" if len(servers) == 1 else len(servers)
    _expect(table, "server_count", count, path)
    _expect(table, "group_id", "0", path)
    return Group(servers)


def read_global(path: str) -> tuple[list[Group], str]:
    """Read all pods in file order with their cluster ids, and the file's digest.

    Raises:
        Refusal: a wrong shape, a wrong type, or a device or device_ip that occurs twice.
    """
    table = _load(path)
    entries = table.get("server_group_list")
    if not isinstance(entries, list) or not entries:
        raise Refusal("ranktable-schema", f"{path}: server_group_list must be a list of pods")
    groups: list[Group] = []
    devices = 0
    for index, entry in enumerate(entries):
        where = f"{path}: server_group_list[{index}]"
        servers = _servers(entry, where)
        _expect(entry, "group_id", str(index), where)
        _expect(entry, "server_count", len(servers), where)
        groups.append(Group(servers, cluster_id=devices))
        devices += len(groups[-1].ranks)
    _check_disjoint(groups, path)
    canonical = json.dumps(table, sort_keys=True).encode()
    return groups, hashlib.sha256(canonical).hexdigest()


def reorder(group: Group, addresses: list[str]) -> Group:
    """Sort a decode pod by its server IP list, and renumber its ranks."""
    found = [server.server_ip for server in group.servers]
    if sorted(found) != sorted(addresses):
        raise Refusal("decode-ips", f"list has {addresses}, ranktable group has {found}")
    by_ip = {server.server_ip: server for server in group.servers}
    return Group(tuple(by_ip[address] for address in addresses), group.cluster_id)


def _load(path: str) -> dict:
    try:
        table = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Refusal("ranktable-file", f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise Refusal("ranktable-schema", f"{path}: must be an object")
    _expect(table, "version", "1.0", path)
    _expect(table, "status", "completed", path)
    return table


def _expect(table: dict, key: str, expected: Any, where: str) -> None:
    found = table.get(key)
    if type(found) is not type(expected) or found != expected:
        raise Refusal("ranktable-schema", f"{where}: {key} must be {expected!r}, found {found!r}")


def _servers(table: Any, where: str) -> tuple[Server, ...]:
    entries = table.get("server_list") if isinstance(table, dict) else None
    if not isinstance(entries, list) or not entries:
        raise Refusal("ranktable-schema", f"{where}: server_list must be a list of servers")
    servers = []
    rank = 0
    for entry in entries:
        servers.append(_server(entry, rank, where))
        rank += len(servers[-1].devices)
    addresses = [server.server_ip for server in servers]
    if len(set(addresses)) != len(addresses):
        raise Refusal("ranktable-schema", f"{where}: server_list names one server twice: {addresses}")
    return tuple(servers)


def _server(entry: Any, first_rank: int, where: str) -> Server:
    devices = entry.get("device") if isinstance(entry, dict) else None
    if not isinstance(devices, list) or not devices:
        raise Refusal("ranktable-schema", f"{where}: a server's device must be a list of devices")
    server_ip = _address(entry, "server_ip", where)
    _expect(entry, "server_id", server_ip, where)
    return Server(
        server_ip,
        tuple(_device(device, first_rank + i, where) for i, device in enumerate(devices)),
    )


def _device(entry: Any, rank: int, where: str) -> Device:
    if not isinstance(entry, dict):
        raise Refusal("ranktable-schema", f"{where}: a device must be an object, found {entry!r}")
    device_id = entry.get("device_id")
    if not isinstance(device_id, str) or not device_id.isdecimal():
        raise Refusal(
            "ranktable-schema", f"{where}: device_id must be a decimal string, found {device_id!r}"
        )
    _expect(entry, "rank_id", str(rank), where)
    return Device(int(device_id), _address(entry, "device_ip", where), rank)


def _address(entry: dict, key: str, where: str) -> str:
    value = entry.get(key)
    try:
        if not isinstance(value, str):
            raise ValueError
        ipaddress.IPv4Address(value)
    except ValueError:
        raise Refusal(
            "ranktable-schema", f"{where}: {key} must be an IPv4 address, found {value!r}"
        ) from None
    return value


def _check_disjoint(groups: list[Group], path: str) -> None:
    ranks = [rank for group in groups for rank in group.ranks]
    if twice := _repeated(ranks):
        raise Refusal("ranktable-schema", f"{path}: devices of two pods (server, device): {twice}")
    addresses = [
        device.device_ip for group in groups for server in group.servers for device in server.devices
    ]
    if twice := _repeated(addresses):
        raise Refusal("ranktable-schema", f"{path}: device_ip of two devices: {twice}")


def _repeated(items: list[Any]) -> list[Any]:
    return sorted(item for item, count in Counter(items).items() if count > 1)
