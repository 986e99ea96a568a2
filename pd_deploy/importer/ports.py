"""The ports of imported instances, as the deployment file's formula and its exceptions. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from pd_deploy.config.models import Ports
from pd_deploy.config.topology import Instance
from pd_deploy.importer.source import Server, Source

_DEFAULT = Ports()
_KINDS = (("master", "master_port"), ("api", "api_port"), ("zmq", "zmq_port"))


def solve(source: Source) -> dict[str, Any]:
    """Return the keys of `ports` that differ from the defaults, so that the formula gives the first
    prefill's and the first decode's ports: pod by pod, and decode's also host by host."""
    prefills, decodes = source.pods("prefill"), source.pods("decode")
    first, second = prefills[0][0], prefills[1][0] if len(prefills) > 1 else None
    ports: dict[str, Any] = {}
    for key, attribute in _KINDS:
        port = getattr(first, attribute)
        if port is not None:
            ports[key] = port
    offset = _offset(first, decodes[0][0])
    if offset is not None:
        ports["decode_offset"] = offset
    step = _zmq_step(first, second, decodes[0][0], offset or _DEFAULT.decode_offset)
    if step is not None:
        ports["zmq_step"] = step
    default = {**_DEFAULT.model_dump(), "zmq_step": None if source.contract else 1}
    return {key: port for key, port in ports.items() if default[key] != port}


def _offset(prefill: Server, decode: Server) -> int | None:
    for attribute in ("api_port", "master_port"):
        low, high = getattr(prefill, attribute), getattr(decode, attribute)
        if low is not None and high is not None and 1 <= high - low <= 10000:
            return int(high - low)
    return None


def _zmq_step(prefill: Server, second: Server | None, decode: Server, offset: int) -> int | None:
    """Return by how much the KV ports of neighbours differ: of prefills, or of decode's first."""
    if prefill.zmq_port is None:
        return None
    candidates = [(second, 1), (decode, offset)]
    for other, distance in candidates:
        if other is not None and other.zmq_port is not None:
            step, rest = divmod(other.zmq_port - prefill.zmq_port, distance)
            if 1 <= step <= 256 and (not rest or other is second):
                return step
    return None


def of(server: Server, kind: str, instance: Instance) -> int:
    """Return a server's port of a kind; where the source has none, the one that it is given."""
    port = getattr(server, f"{kind}_port")
    return int(port if port is not None else getattr(instance, f"{kind}_port"))


def differing(source: Source, instances: Mapping[str, Instance]) -> Iterator[tuple[Server, str]]:
    """Yield the servers, and the kinds of port, that are given another one than the source has.

    Args:
        instances: what is made of each server, by the server's name.
    """
    for server in source.servers:
        for kind, _ in _KINDS:
            if of(server, kind, instances[server.name]) != getattr(
                instances[server.name], f"{kind}_port"
            ):
                yield server, kind
