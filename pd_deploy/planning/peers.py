"""Which hosts of a service call which, to try their ways to each other. Pure.

All pairs of many hosts would be too many: 48 have 2256. A proxy's host calls all others and is
called by all, as in service; else each host calls those that stand 1, 2, 4 and 8 places from it in
the file, both ways. Up to `FEW` hosts, all call all.
"""

from collections.abc import Collection, Mapping, Sequence

from pd_deploy.config.topology import Topology

STEPS = (1, 2, 4, 8)
FEW = 9
MOST_PORTS = 12
"""Of a host: where one port of a kind is let through, its neighbours are, as a rule."""


def neighbours(hosts: Sequence[str], centres: Collection[str] = ()) -> dict[str, list[str]]:
    """Say which hosts each host calls.

    Args:
        centres: hosts that call all others, and are called by all.
    """
    count = len(hosts)
    called: dict[str, list[str]] = {}
    for place, name in enumerate(hosts):
        places = {(place + way * step) % count for step in STEPS for way in (1, -1)}
        others = {hosts[p] for p in places} | set(centres)
        if name in centres or count <= FEW:
            others = set(hosts)
        called[name] = [host for host in hosts if host in others and host != name]
    return called


def ports(topology: Topology, host: str) -> list[int]:
    """List the ports that others call on a host: the first and the last of each kind."""
    of_kind: dict[str, set[int]] = {}
    for instance in topology.on_host(host):
        for purpose, port in instance.ports.items():
            of_kind.setdefault(purpose.rstrip("0123456789-"), set()).add(port)
    if proxies := topology.proxies_on(host):
        of_kind["proxy"] = {proxy.port for proxy in proxies}
    chosen = {port for kind in of_kind.values() for port in (min(kind), max(kind))}
    return sorted(chosen)[:MOST_PORTS]


def calls(
    called: Mapping[str, Sequence[str]], ports_of: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[str, int]]]:
    """Say which ports of which hosts each host calls."""
    return {
        name: [(other, port) for other in others for port in ports_of[other]]
        for name, others in called.items()
    }
