"""Ranktables: device addresses in, documents out (contract sections 3.2 to 3.4). Pure."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from itertools import count
from typing import Any

from pd_deploy.config.topology import Pod, Topology
from pd_deploy.engines.ascend import query_at_once
from pd_deploy.engines.base import Layout, Service
from pd_deploy.errors import FactsError

DeviceAddresses = Mapping[str, Mapping[int, str]]
"""Host name → device id → IPv4 address of the device's network port."""


def files(service: Service) -> dict[str, dict[str, str]]:
    """Render the merged document, for every host, and those of the pods on it: host → path →
    content."""
    addresses = {name: facts.device_addresses for name, facts in service.facts.items()}
    topology, layout = service.topology, service.layout
    all_pods = render(merged(topology, addresses))
    of_pod = {pod.name: render(local(pod, addresses)) for pod in topology.pods}
    return {
        host: {
            merged_path(layout): all_pods,
            **{local_path(layout, i.pod): of_pod[i.pod] for i in topology.on_host(host)},
        }
        for host in service.deployment.hosts
    }


def merged_path(layout: Layout) -> str:
    """Return where the document of all pods lies."""
    return f"{layout.ranktables}/global_ranktable_merge.json"


def local_path(layout: Layout, pod: str) -> str:
    """Return where a pod's document lies."""
    return f"{layout.ranktables}/local_ranktable_{pod}.json"


def local(pod: Pod, addresses: DeviceAddresses) -> dict[str, Any]:
    """Build the document of one pod; `server_count` is text on one host, a number on several."""
    return {
        "version": "1.0",
        "status": "completed",
        "group_id": "0",
        "server_count": "1" if len(pod.members) == 1 else len(pod.members),
        "server_list": _servers(pod, addresses),
    }


def merged(topology: Topology, addresses: DeviceAddresses) -> dict[str, Any]:
    """Build the document of the whole service: one group per pod in canonical order.

    The KV-transfer id of a device is the running count over this order, so it must be the same
    on every host; here `server_count` is always a number.
    """
    groups = [
        {
            "group_id": str(index),
            "server_count": len(pod.members),
            "server_list": _servers(pod, addresses),
        }
        for index, pod in enumerate(topology.pods)
    ]
    return {"version": "1.0", "status": "completed", "server_group_list": groups}


def render(document: Mapping[str, Any]) -> str:
    """Write a document as file content."""
    return json.dumps(document, indent=4) + "\n"


def read_addresses_command(devices: Iterable[int]) -> list[str]:
    """Return one command that prints the address of every device, for `parse_addresses`."""
    script = query_at_once("ip", "device")
    return ["sh", "-c", script, "hccn_tool", *map(str, devices)]


def parse_addresses(output: str, devices: Sequence[int], *, host: str) -> dict[int, str]:
    """Parse the device addresses in the output of `read_addresses_command`.

    Raises:
        FactsError: devices without a valid IPv4 address, all of them, with what was printed; or an
            address that two devices share.
    """
    sections = re.split(r"^device (\d+)\n", output, flags=re.MULTILINE)[1:]
    outputs = dict(zip(map(int, sections[::2]), sections[1::2], strict=True))
    addresses = {device: _address(outputs.get(device, "")) for device in devices}
    bad = [
        f"device {device}: {outputs.get(device, '').strip() or 'no output'}"
        for device, address in addresses.items()
        if address is None
    ]
    good = [address for address in addresses.values() if address]
    bad += [f"address {a} is given twice" for a in sorted({a for a in good if good.count(a) > 1})]
    if bad:
        raise FactsError(
            "expected one IPv4 address per device from `hccn_tool -i DEVICE -ip -g`, found: "
            + "; ".join(bad),
            host=host,
            hint="configure the devices' network with `hccn_tool -i DEVICE -ip -s address …`",
        )
    return {device: address for device, address in addresses.items() if address}


def check_addresses(addresses: DeviceAddresses) -> None:
    """Check that every device has an address of its own, over all hosts.

    Devices leave the factory with the same addresses on every host; two of them would link with
    each other's peers.

    Raises:
        FactsError: names every address that several devices have, and the devices.
    """
    holders: dict[str, list[str]] = {}
    for host, of_device in addresses.items():
        for device, address in of_device.items():
            holders.setdefault(address, []).append(f"device {device} on {host}")
    shared = [
        f"{address} is the address of {' and of '.join(devices)}"
        for address, devices in holders.items()
        if len(devices) > 1
    ]
    if shared:
        raise FactsError(
            f"expected an address of its own for each device, found: {'; '.join(shared)}",
            hint="give each device another one with `hccn_tool -i DEVICE -ip -s address …`",
        )


def _address(text: str) -> str | None:
    match = re.search(r"^ipaddr:\s*(\S+)\s*$", text, re.MULTILINE)
    try:
        return str(IPv4Address(match[1])) if match else None
    except ValueError:
        return None


def _servers(pod: Pod, addresses: DeviceAddresses) -> list[dict[str, Any]]:
    """List a pod's hosts in its order; ranks count over all of them."""
    rank = count()
    return [
        {
            "server_id": member.address,
            "server_ip": member.address,
            "device": [
                {
                    "device_id": str(device),
                    "device_ip": addresses[member.host][device],
                    "rank_id": str(next(rank)),
                }
                for device in member.devices
            ],
        }
        for member in pod.members
    ]
