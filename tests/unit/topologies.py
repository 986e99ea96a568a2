"""Random services of every topology the project supports: hosts of 8 or 16 devices, pods of one or
several hosts, hosts that several pods share."""

from typing import Any

from hypothesis import strategies as st


@st.composite
def services(draw: st.DrawFn) -> dict[str, Any]:
    """Changes that make another service of the example."""
    per_host = draw(st.sampled_from([8, 16]))
    size = draw(st.sampled_from([1, 2, 4, 8]))
    tp = draw(st.sampled_from([t for t in (1, 2, 4, 8) if size % t == 0]))
    octets = draw(st.lists(st.integers(1, 250), min_size=1, max_size=5, unique=True))
    free = {
        f"h{index}": draw(st.permutations(range(per_host // size))) for index in range(len(octets))
    }
    decode = _decode(draw, free, size, tp)
    prefill: dict[str, Any] = {}
    span = 1  # all prefills span as many hosts: they must be of one size
    for index in range(draw(st.integers(1, 6))):
        able = [host for host, slots in free.items() if slots]
        if not prefill and able:
            span = draw(st.integers(1, len(able)))
        if len(able) >= span:
            prefill[f"x{index}"] = _pod(draw, free, size, span)
    if not prefill:
        free["spare"] = [0]
        octets = [*octets, 251]
        prefill["x0"] = _pod(draw, free, size, 1)
    names = [f"h{index}" for index in range(len(octets))]
    names = [*names[:-1], "spare"] if "spare" in free else names
    return {
        "profile": "deepseek-r1-a3-2p1d",
        "devices_per_host": per_host,
        "hosts": {"a": None, "b": None}
        | {name: f"10.0.0.{octet}" for name, octet in zip(names, octets, strict=True)},
        "prefill": {"p0": None, "p1": None, "p2": None} | prefill,
        "decode": {"d0": {"host": None, "tensor_parallel": tp, **decode}},
        "proxy": {"c0": {"host": "h0"}},
    }


def _decode(draw: st.DrawFn, free: dict[str, Any], size: int, tp: int) -> dict[str, Any]:
    """A decode; one with several copies of the model takes the first devices of its hosts."""
    span = draw(st.integers(1, len(free)))
    if size * span == tp:
        return _pod(draw, free, size, span)
    hosts = draw(st.lists(st.sampled_from(list(free)), min_size=span, max_size=span, unique=True))
    for host in hosts:
        free[host] = [slot for slot in free[host] if slot]
    return _placed(hosts, {host: list(range(size)) for host in hosts})


def _pod(draw: st.DrawFn, free: dict[str, Any], size: int, span: int) -> dict[str, Any]:
    """Takes a slot of `size` devices on `span` hosts, the master anywhere among them."""
    able = [host for host, slots in free.items() if slots]
    hosts = draw(st.lists(st.sampled_from(able), min_size=span, max_size=span, unique=True))
    devices = {}
    for host in hosts:
        slot, free[host] = free[host][0], free[host][1:]
        devices[host] = draw(st.permutations(range(slot * size, (slot + 1) * size)))
    return _placed(hosts, devices)


def _placed(hosts: list[str], devices: dict[str, list[int]]) -> dict[str, Any]:
    if len(hosts) == 1:
        return {"host": hosts[0], "devices": devices[hosts[0]]}
    return {"hosts": hosts, "devices": devices}
