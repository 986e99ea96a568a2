"""What a host's devices say of themselves. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pd_deploy.hosts.batch import Batch, Lane


@dataclass(frozen=True)
class Device:
    """A device; "" where it was not asked, or did not tell.

    Attributes:
        health: what its driver says of it.
        link: whether its network port is UP.
        net_health: what it says of the way to the address that it probes.
        tls: whether it encrypts what it sends, `0` or `1`.
        address, netmask, gateway: its network as it is now.
        stored_address: the one that it has after a start.
        virtual_address: the one within its super-node.
    """

    health: str = ""
    link: str = ""
    net_health: str = ""
    tls: str = ""
    address: str = ""
    netmask: str = ""
    gateway: str = ""
    stored_address: str = ""
    virtual_address: str = ""


@dataclass(frozen=True)
class DeviceReport:
    """The devices that a service uses on a host, and what drives them.

    Attributes:
        driver: the version that is loaded.
        installed_driver: the one that is loaded after a start.
        firmware: its version.
        has_super_node: whether devices have a second network, within a super-node.
        unread: what tools printed that nobody understands, each with the tool.
    """

    driver: str = ""
    installed_driver: str = ""
    firmware: str = ""
    has_super_node: bool = False
    devices: Mapping[int, Device] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ping:
    """A device that calls a device of another host.

    Attributes:
        within: whether by the network within a super-node.
    """

    device: int
    address: str
    host: str
    within: bool = False


@dataclass(frozen=True)
class Lost:
    """Packets of a ping that were lost; `printed` is what nobody understands, else ""."""

    ping: Ping
    sent: int = 0
    received: int = 0
    printed: str = ""


class DeviceTools(Protocol):
    """The tools of a kind of device."""

    FIT: tuple[str, ...]
    """What the driver says of devices that are in order."""
    WORKING: tuple[str, ...]
    """What it says of those that work nevertheless."""

    def lanes(self, devices: Sequence[int], *, full: bool) -> tuple[Lane, list[Lane]]:
        """List the commands for `parse`: those for all devices, and those of each.

        Args:
            full: whether to ask what takes longer, too.
        """

    def parse(self, batch: Batch, devices: Sequence[int], *, full: bool) -> DeviceReport:
        """Parse what these printed."""

    def further(self, devices: Sequence[int]) -> Lane:
        """List commands that tell more of devices, for a capture."""

    def ping_lanes(self, pings: Sequence[Ping]) -> list[Lane]:
        """List the commands of pings, those of a device one after the other."""

    def lost(self, batch: Batch, pings: Sequence[Ping]) -> list[Lost]:
        """Parse which pings lost packets."""
