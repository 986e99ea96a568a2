"""The lab's network: a bridge in the switch's namespace, a cable to each host and to the machine.

The bridge is not in the machine's own network namespace, so the machine's firewall rules,
forwarding settings and Docker engine don't affect the lab's traffic, and no traffic leaves it.
"""

import contextlib
import json
from ipaddress import IPv4Network, ip_network
from pathlib import Path

from pd_deploy.lab.box import Box
from pd_deploy.lab.errors import LabError
from pd_deploy.lab.system import run

NEIGHBOURS = Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3")
"""How many neighbours the kernel knows, of all network namespaces together; 1024 by default."""


def parse_subnet(text: str) -> IPv4Network:
    """Parse the lab's subnet.

    Raises:
        LabError: it is not an IPv4 network of 32 to 65536 addresses.
    """
    try:
        subnet = IPv4Network(text)
    except ValueError as error:
        raise LabError(
            f"expected a subnet such as 10.77.0.0/24, found {text!r} ({error})"
        ) from None
    # At least 32 addresses: the hosts get .11, .12, …, the machine the last one.
    if not 16 <= subnet.prefixlen <= 27:
        raise LabError(f"expected a subnet with a prefix length from 16 to 27, found {text}")
    return subnet


def check_free(link: str, subnet: IPv4Network) -> None:
    """Refuse a link name or a subnet that the machine already uses for something else.

    Raises:
        LabError: names the interface that uses it.
    """
    for interface in json.loads(run(["ip", "-json", "address", "show"])):
        if interface["ifname"] == link:
            raise LabError(
                f"network interface {link} already exists and is not this lab's: "
                f"choose another --name, or remove the interface with `ip link delete {link}`"
            )
    for route in json.loads(run(["ip", "-4", "-json", "route", "show", "table", "all"])):
        destination = route["dst"]
        if destination == "default" or route.get("type") == "broadcast":
            continue
        other = ip_network(destination, strict=False)
        # Wider routes are default routes in disguise, as VPNs set them.
        if other.prefixlen >= 8 and other.overlaps(subnet):
            raise LabError(
                f"subnet {subnet} overlaps {destination} on interface "
                f"{route.get('dev', '?')}: choose another --subnet"
            )


def make_room_for_neighbours(hosts: int) -> None:
    """Let the kernel know as many neighbours as hosts that all talk to each other have.

    Beyond its limit, which counts for the whole machine and lasts until it restarts, packets are
    dropped: from about 30 hosts on, connections between them would stand still for minutes.

    Raises:
        LabError: the limit can't be raised.
    """
    needed = 2 * (hosts + 2) ** 2
    if int(NEIGHBOURS.read_text()) >= needed:
        return
    try:
        NEIGHBOURS.write_text(str(needed))
    except OSError as error:
        raise LabError(
            f"expected {NEIGHBOURS} to be {needed} or more, as {hosts} hosts need, and could not "
            f"write it ({error.strerror}): start fewer hosts, or set it with sysctl"
        ) from None


def plug_in_host(cable: str, host_pid: int, switch: Box) -> None:
    """Connect a host's eth0 to the switch's bridge, where the interface is named ``cable``."""
    in_host = ["peer", "name", "eth0", "netns", str(host_pid)]
    at_switch = ["name", cable, "netns", str(switch.init_pid)]
    run(["ip", "link", "add", *at_switch, "type", "veth", *in_host])
    in_switch(switch, "ip", "link", "set", "dev", cable, "master", "eth0", "up")


def plug_in_machine(link: str, address: str, switch: Box) -> None:
    """Give the machine an interface ``link`` in the lab; ``address`` has a prefix length."""
    at_switch = ["peer", "name", "machine", "netns", str(switch.init_pid)]
    run(["ip", "link", "add", "name", link, "type", "veth", *at_switch])
    in_switch(switch, "ip", "link", "set", "dev", "machine", "master", "eth0", "up")
    run(["ip", "address", "add", address, "dev", link])
    run(["ip", "link", "set", "dev", link, "up"])


def set_cable(cable: str, state: str, switch: Box) -> None:
    """Plug a host's cable into the switch (``up``), or unplug it (``down``)."""
    in_switch(switch, "ip", "link", "set", "dev", cable, state)


def unplug_machine(link: str) -> bool:
    """Remove the machine's interface in the lab; return False if it was already gone."""
    if not link_exists(link):
        return False
    # The kernel removes it soon after the switch's namespace, maybe before this command does.
    with contextlib.suppress(LabError):
        run(["ip", "link", "delete", link])
    return True


def link_exists(link: str) -> bool:
    """Tell whether the machine has a network interface of this name."""
    return any(i["ifname"] == link for i in json.loads(run(["ip", "-json", "link", "show"])))


def in_switch(switch: Box, *argv: str) -> None:
    """Run one of the machine's commands in the switch's network namespace."""
    run(["nsenter", "--target", str(switch.init_pid), "--net", *argv])
