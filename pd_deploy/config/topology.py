"""What follows from a deployment: pods, members, ranks, ports and servers in one canonical order.

Prefill pods come first, in the order of the file, then decode; `kv_rank` counts prefill pods from
0 and the decode pod follows. Within a pod the master comes first, then the other hosts; everything
that lists hosts, ranks or devices follows this order (contract section 1).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pd_deploy.config.models import ProxyEntry, Settings

ServingRole = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Instance:
    """One launcher on some devices of one host: a pod, or a pod's member on that host.

    `api_ports` are those of its API servers; hosts without any follow their pod's master.
    Peers fetch its KV at `kv_ports`; `further_ports` are others that it binds, by purpose.
    `data_parallel` counts the copies of the model in its pod,
    `ranks` those of this instance, and `server_offset` those of the members before it.
    """

    name: str
    pod: str
    role: ServingRole
    host: str
    address: str
    devices: tuple[int, ...]
    kv_rank: int
    node_rank: int
    pod_addresses: tuple[str, ...]
    master_port: int
    api_port: int
    api_ports: tuple[int, ...]
    zmq_port: int
    kv_ports: tuple[int, ...]
    ray_port: int | None
    tensor_parallel: int
    ranks: int
    server_offset: int
    data_parallel: int
    settings: Settings
    further_ports: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> str:
        """Where it stands in the deployment file."""
        return f"{self.role}.{self.pod}"

    @property
    def is_master(self) -> bool:
        """Whether its address is the one that its pod is known by."""
        return self.node_rank == 0

    @property
    def master_address(self) -> str:
        """The address of its pod's master."""
        return self.pod_addresses[0]

    @property
    def spans_hosts(self) -> bool:
        """Whether its pod has other members."""
        return len(self.pod_addresses) > 1

    @property
    def has_copies(self) -> bool:
        """Whether its pod has several copies of the model (data parallel)."""
        return self.data_parallel > 1

    @property
    def uses_ray(self) -> bool:
        """Whether ray joins its pod's hosts to one engine; a decode has one engine per server, and
        some engines join hosts themselves."""
        return self.spans_hosts and self.role == "prefill" and self.ray_port is not None

    @property
    def ports(self) -> dict[str, int]:
        """The ports that it listens on, by purpose."""
        ports = {
            f"api-{index}" if index else "api": port for index, port in enumerate(self.api_ports)
        }
        if self.is_master:
            ports["master"] = self.master_port
        for index, port in enumerate(self.kv_ports):
            ports[f"zmq-{index}" if index else "zmq"] = port
        if self.uses_ray and self.is_master and self.ray_port is not None:
            ports["ray"] = self.ray_port
        return ports | dict(self.further_ports)

    @property
    def servers(self) -> tuple[str, ...]:
        """`address:port` of each of its API servers."""
        return tuple(f"{self.address}:{port}" for port in self.api_ports)

    @property
    def server(self) -> str:
        """Its API servers for people: `address:first-last`."""
        if len(self.api_ports) > 1:
            return f"{self.servers[0]}-{self.api_ports[-1]}"
        return self.servers[0] if self.servers else self.address

    @property
    def device_list(self) -> str:
        """Its devices as the runtime wants them, `0,1,2`."""
        return ",".join(map(str, self.devices))


@dataclass(frozen=True)
class Pod:
    """One logical engine: a group of the ranktable, on one host or several."""

    name: str
    role: ServingRole
    kv_rank: int
    members: tuple[Instance, ...]

    @property
    def key(self) -> str:
        """Where it stands in the deployment file."""
        return self.master.key

    @property
    def master(self) -> Instance:
        """The member that the others follow."""
        return self.members[0]

    @property
    def tensor_parallel(self) -> int:
        """Devices that share one copy of the model."""
        return self.master.tensor_parallel

    @property
    def has_copies(self) -> bool:
        """Whether it has several copies of the model (data parallel)."""
        return self.master.has_copies

    @cached_property
    def device_list(self) -> str:
        """The devices of all of its hosts, host by host, as the runtime wants them."""
        return ",".join(member.device_list for member in self.members)

    @property
    def device_count(self) -> int:
        """The number of its devices, on all of its hosts."""
        return sum(len(member.devices) for member in self.members)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its hosts' addresses, the master's first."""
        return self.master.pod_addresses

    @property
    def servers(self) -> tuple[str, ...]:
        """`address:port` of all its API servers."""
        return tuple(server for member in self.members for server in member.servers)


@dataclass(frozen=True)
class Proxy:
    """A proxy that clients talk to."""

    name: str
    host: str
    address: str
    entry: ProxyEntry
    metrics_port: int | None = None

    @property
    def ports(self) -> dict[str, int]:
        """All ports that it listens on, by purpose."""
        metrics = {} if self.metrics_port is None else {"metrics": self.metrics_port}
        return {"service": self.port, **metrics}

    @property
    def port(self) -> int:
        """The port that clients use."""
        return self.entry.port

    @property
    def server(self) -> str:
        """`address:port` where clients ask."""
        return f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Topology:
    """All pods in canonical order, and the proxies, of which each has all of them behind it."""

    prefill: tuple[Pod, ...]
    decode: tuple[Pod, ...]
    proxies: tuple[Proxy, ...]

    @property
    def pods(self) -> tuple[Pod, ...]:
        """Prefill, then decode: the order of ranktable groups and of KV-transfer ranks."""
        return self.prefill + self.decode

    @cached_property
    def instances(self) -> tuple[Instance, ...]:
        """The members of all pods."""
        return tuple(member for pod in self.pods for member in pod.members)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that runs: instances, then the proxies."""
        return (*(i.name for i in self.instances), *self.proxy_names)

    @cached_property
    def proxy_names(self) -> tuple[str, ...]:
        """Names of the proxies."""
        return tuple(proxy.name for proxy in self.proxies)

    @property
    def home(self) -> str:
        """The host whose record counts where others differ, and through which registries are asked:
        the first proxy's."""
        return self.proxies[0].host

    @cached_property
    def decode_names(self) -> tuple[str, ...]:
        """Names of decode's instances."""
        return tuple(member.name for pod in self.decode for member in pod.members)

    @cached_property
    def ray_names(self) -> tuple[str, ...]:
        """Names of the instances that ray joins: members of prefills that span hosts."""
        return tuple(i.name for i in self.instances if i.uses_ray)

    def instance(self, name: str) -> Instance | None:
        """Return an instance; None if it is a proxy."""
        return self._instances.get(name)

    def proxy(self, name: str) -> Proxy:
        """Return a proxy."""
        return self._proxies[name]

    def proxies_on(self, host: str) -> tuple[Proxy, ...]:
        """List the proxies of one host."""
        return tuple(proxy for proxy in self.proxies if proxy.host == host)

    def pod_of(self, name: str) -> Pod:
        """Return the pod that an instance belongs to."""
        return self._pods[name]

    def on_host(self, host: str) -> tuple[Instance, ...]:
        """List the instances of one host."""
        return self._on_host.get(host, ())

    def host_of(self, name: str) -> str:
        """Return the name of the host that an instance, or a proxy, runs on."""
        return self._hosts[name]

    @cached_property
    def _instances(self) -> dict[str, Instance]:
        return {i.name: i for i in self.instances}

    @cached_property
    def _pods(self) -> dict[str, Pod]:
        return {member.name: pod for pod in self.pods for member in pod.members}

    @cached_property
    def _on_host(self) -> dict[str, tuple[Instance, ...]]:
        on_host: dict[str, list[Instance]] = {}
        for instance in self.instances:
            on_host.setdefault(instance.host, []).append(instance)
        return {host: tuple(instances) for host, instances in on_host.items()}

    @cached_property
    def _hosts(self) -> dict[str, str]:
        proxies = {proxy.name: proxy.host for proxy in self.proxies}
        return {i.name: i.host for i in self.instances} | proxies

    @cached_property
    def _proxies(self) -> dict[str, Proxy]:
        return {proxy.name: proxy for proxy in self.proxies}
