"""What follows from a deployment: pods, ranks, ports, server lists, in one canonical order.

Prefill pods come first, in the order of the file, then decode; `kv_rank` counts prefill pods
from 0 and the decode pod follows (contract section 1).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pd_deploy.deployment import Deployment, ProxyEntry, Settings
from pd_deploy.errors import InvalidInput, Problem

_RESERVED = {"ranktables"}


@dataclass(frozen=True)
class Instance:
    """One engine instance: a launcher with its API server on some devices of one host."""

    name: str
    role: Literal["prefill", "decode"]
    host: str
    address: str
    devices: tuple[int, ...]
    kv_rank: int
    node_rank: int
    master_address: str
    master_port: int
    api_port: int
    zmq_port: int
    tensor_parallel: int
    settings: Settings

    @property
    def ports(self) -> dict[str, int]:
        """The ports that the instance listens on, by purpose."""
        return {"api": self.api_port, "master": self.master_port, "zmq": self.zmq_port}

    @property
    def server(self) -> str:
        """`address:port` of its API server."""
        return f"{self.address}:{self.api_port}"

    @property
    def device_list(self) -> str:
        """Its devices as the runtime wants them, `0,1,2`."""
        return ",".join(map(str, self.devices))


@dataclass(frozen=True)
class Proxy:
    """The proxy that clients talk to."""

    name: str
    host: str
    address: str
    entry: ProxyEntry

    @property
    def port(self) -> int:
        """The port that clients use."""
        return self.entry.port


@dataclass(frozen=True)
class Topology:
    """All instances in canonical order, and the proxy."""

    prefill: tuple[Instance, ...]
    decode: tuple[Instance, ...]
    proxy: Proxy

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Prefill, then decode: the order of ranktable groups and of KV-transfer ranks."""
        return self.prefill + self.decode

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that runs: instances, then the proxy."""
        return (*(i.name for i in self.instances), self.proxy.name)

    def on_host(self, host: str) -> tuple[Instance, ...]:
        """The instances of one host."""
        return tuple(i for i in self.instances if i.host == host)

    def host_of(self, name: str) -> str:
        """The host that an instance, or the proxy, runs on."""
        if name == self.proxy.name:
            return self.proxy.host
        return next(i.host for i in self.instances if i.name == name)


def build(deployment: Deployment) -> Topology:
    """The topology of a deployment.

    Raises:
        InvalidInput: instances that share names, devices or ports on a host, and what the engine
            could not run.
    """
    topology = _derive(deployment)
    problems = list(_problems(deployment, topology))
    if problems:
        raise InvalidInput(problems, source=f"deployment {deployment.name}")
    return topology


def _derive(deployment: Deployment) -> Topology:
    (proxy_name, proxy), *_ = deployment.proxy.items()
    prefill = tuple(
        _instance(deployment, "prefill", name, rank) for rank, name in enumerate(deployment.prefill)
    )
    decode = tuple(
        _instance(deployment, "decode", name, rank) for rank, name in enumerate(deployment.decode)
    )
    address = deployment.hosts[proxy.host].address
    return Topology(prefill, decode, Proxy(proxy_name, proxy.host, address, proxy))


def _instance(
    deployment: Deployment, role: Literal["prefill", "decode"], name: str, rank: int
) -> Instance:
    entry = (deployment.prefill if role == "prefill" else deployment.decode)[name]
    settings = deployment.settings_of(role, entry)
    address = deployment.hosts[entry.host].address
    ports, offset = deployment.ports, rank
    if role == "decode":
        offset += deployment.ports.decode_offset
    return Instance(
        name=name,
        role=role,
        host=entry.host,
        address=address,
        devices=entry.devices,
        kv_rank=rank if role == "prefill" else len(deployment.prefill) + rank,
        node_rank=0,
        master_address=address,
        master_port=ports.master + offset,
        api_port=ports.api + offset,
        zmq_port=ports.zmq + offset,
        tensor_parallel=settings.tensor_parallel or len(entry.devices),
        settings=settings,
    )


def _problems(deployment: Deployment, topology: Topology) -> Iterator[Problem]:
    yield from _shared_names(topology)
    yield from _shared_addresses(deployment)
    yield from _shared_devices(topology)
    yield from _shared_ports(topology)
    yield from _beyond_limits(deployment, topology)
    for instance in topology.instances:
        yield from _tuning(deployment, instance)


def _shared_names(topology: Topology) -> Iterator[Problem]:
    for name, count in Counter(topology.names).items():
        if count > 1:
            yield Problem(name, "expected a name used once among prefill, decode and proxy")
        if name in _RESERVED:
            yield Problem(name, "expected another name; it is that of the ranktables' directory")


def _shared_addresses(deployment: Deployment) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for name, entry in deployment.hosts.items():
        if entry.address in seen:
            yield Problem(
                f"hosts.{name}",
                f"expected an address of its own, found {entry.address}, "
                f"which host {seen[entry.address]} has",
            )
        seen.setdefault(entry.address, name)


def _shared_devices(topology: Topology) -> Iterator[Problem]:
    holder: dict[tuple[str, int], str] = {}
    for instance in topology.instances:
        taken = {
            d: holder[instance.host, d] for d in instance.devices if (instance.host, d) in holder
        }
        for other in sorted(set(taken.values())):
            devices = ", ".join(str(d) for d, name in taken.items() if name == other)
            yield Problem(
                f"{instance.role}.{instance.name}.devices",
                f"expected devices of its own on host {instance.host}, "
                f"found {devices}, which {other} has",
            )
        holder |= {(instance.host, d): instance.name for d in instance.devices if d not in taken}


def _shared_ports(topology: Topology) -> Iterator[Problem]:
    proxy = topology.proxy
    holder = {(proxy.host, proxy.port): f"the port of proxy {proxy.name}"}
    for instance in topology.instances:
        for purpose, port in instance.ports.items():
            place = (instance.host, port)
            if port > 65535:
                yield Problem(
                    "ports", f"{purpose} port of {instance.name} would be {port}, above 65535"
                )
            if place in holder:
                yield Problem(
                    f"{instance.role}.{instance.name}",
                    f"its {purpose} port {port} on host {instance.host} is also {holder[place]}",
                )
            holder.setdefault(place, f"the {purpose} port of {instance.name}")


def _beyond_limits(deployment: Deployment, topology: Topology) -> Iterator[Problem]:
    if len(topology.prefill) > deployment.ports.decode_offset:
        yield Problem(
            "ports.decode_offset",
            f"expected at least the number of prefill instances ({len(topology.prefill)}), "
            f"found {deployment.ports.decode_offset}: their ports would overlap decode's",
        )
    for instance in topology.instances:
        beyond = [d for d in instance.devices if d >= deployment.devices_per_host]
        if beyond:
            yield Problem(
                f"{instance.role}.{instance.name}.devices",
                f"expected ids below {deployment.devices_per_host} (profile {deployment.profile}), "
                f"found {', '.join(map(str, beyond))}",
            )
    if len(topology.decode) > 1:
        yield Problem(
            "decode",
            f"expected one instance, found {', '.join(i.name for i in topology.decode)}: "
            "this engine links every prefill with a single decode pod",
        )


def _tuning(deployment: Deployment, instance: Instance) -> Iterator[Problem]:
    key = f"{instance.role}.{instance.name}"
    if instance.tensor_parallel != len(instance.devices):
        yield Problem(
            f"{key}.tensor_parallel",
            f"expected the number of its devices ({len(instance.devices)}), "
            f"found {instance.tensor_parallel}",
        )
    model = deployment.model
    longest = model.max_len_prefill if instance.role == "prefill" else model.max_len_decode
    batched = instance.settings.arguments.get("max-num-batched-tokens")
    if batched is not None and (not isinstance(batched, int) or batched < longest):
        yield Problem(
            f"{key}.arguments.max-num-batched-tokens",
            f"expected at least the model length of {longest} tokens, found {batched!r}: "
            "a longer prompt would be accepted, never scheduled, and block all behind it",
        )
    if instance.role == "decode":
        yield from _links(deployment, instance)
    for name, value in instance.settings.arguments.items():
        if isinstance(value, str) and (not value or any(c.isspace() for c in value)):
            yield Problem(
                f"{key}.arguments.{name}",
                f"expected a value without blanks (the launcher splits at them), found {value!r}",
            )


def _links(deployment: Deployment, decode: Instance) -> Iterator[Problem]:
    for name, entry in deployment.prefill.items():
        if len(entry.devices) != len(decode.devices):
            yield Problem(
                f"prefill.{name}.devices",
                f"expected as many devices as decode {decode.name} has ({len(decode.devices)}), "
                f"found {len(entry.devices)}: the image links their ranks one to one",
            )
