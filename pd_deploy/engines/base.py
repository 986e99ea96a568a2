"""The plug-in point: what an engine has to say about a service. No I/O."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from pd_deploy.config.models import Deployment, Settings
from pd_deploy.config.topology import Instance, Proxy, Topology
from pd_deploy.engines.device_report import DeviceTools
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.engines.load_generator import LoadGenerator
from pd_deploy.errors import Problem
from pd_deploy.hosts.container_values import ContainerSpec

Finding = tuple[str, Problem]
"""A rule that is broken, by name, and where."""


@dataclass(frozen=True)
class HostFacts:
    """What the engine needs to know of a host.

    Attributes:
        interface: the one that owns its address.
        device_addresses: the network address of each device.
        route_address: its own address on its default route; None if it has no such route.
    """

    interface: str
    device_addresses: Mapping[int, str]
    route_address: str | None = None


@dataclass(frozen=True)
class Layout:
    """Where the files of one generation lie, the same on every host."""

    deployment: str
    generation: str
    state: str
    logs: str

    @classmethod
    def of(cls, deployment: Deployment, generation: str) -> Self:
        """Lay out a deployment's generation below the file's paths."""
        return cls(deployment.name, generation, deployment.paths.state, deployment.paths.logs)

    @staticmethod
    def root_of(deployment: Deployment) -> str:
        """Return the directory of all that pd-deploy writes for a deployment, except logs."""
        return f"{deployment.paths.state}/{deployment.name}"

    @staticmethod
    def log_root_of(deployment: Deployment) -> str:
        """Return the directory of all logs of a deployment."""
        return f"{deployment.paths.logs}/{deployment.name}"

    @property
    def directory(self) -> str:
        """All that pd-deploy writes for this generation."""
        return f"{self.state}/{self.deployment}/{self.generation}"

    @property
    def ranktables(self) -> str:
        """The ranktable documents."""
        return f"{self.directory}/ranktables"

    def instance_directory(self, name: str) -> str:
        """Return the directory of what pd-deploy writes for one instance."""
        return f"{self.directory}/{name}"

    def start_script(self, name: str) -> str:
        """Return the path of an instance's main process."""
        return f"{self.instance_directory(name)}/start.sh"

    @property
    def log_root(self) -> str:
        """Parent of the instances' log directories."""
        return f"{self.logs}/{self.deployment}/{self.generation}"

    def log_directory(self, name: str) -> str:
        """Return the directory of an instance's log files."""
        return f"{self.log_root}/{name}"

    @staticmethod
    def code_root(root: str) -> str:
        """Return the directory of all source trees, given that of the deployment. Its name begins
        with a dot, unlike those of generations."""
        return f"{root}/.code"

    def code(self, digest: str) -> str:
        """Return the directory of a source tree, which generations may share."""
        return f"{self.code_root(f'{self.state}/{self.deployment}')}/{digest}"


@dataclass(frozen=True)
class Service:
    """All that an engine is given: the service, where it lies, and what the hosts said.

    `pinned_image` is the image by digest, or by id with `pull: never` or from a file.
    """

    deployment: Deployment
    topology: Topology
    layout: Layout
    facts: Mapping[str, HostFacts]
    pinned_image: str


@dataclass(frozen=True)
class Member:
    """What a pod brings up on one of its hosts.

    `ranks` are copies of the model (data parallel), `servers` the API servers in front of them,
    and `kv_ports` the ports, counted from its zmq port, where others ask for its KV.
    """

    ranks: int
    servers: int
    kv_ports: int


@dataclass(frozen=True)
class Counter:
    """A counter of /metrics: its name there, the labels that its samples must have, and how many of
    what is counted one of it stands for."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()
    scale: int = 1


@dataclass(frozen=True)
class Counters:
    """What an instance counts, as far as it proves that decode used prefill's KV.

    `served`: completed requests, of every instance. `kv_tokens`: prompt tokens whose KV decode got
    from a prefill. `kv_bytes`: what was moved for that; a log where the engine counts none. Where
    `kv_bytes_of` is prefill, they are a proof without which nothing is proven.
    """

    served: Counter
    kv_tokens: Counter
    kv_bytes: Counter
    kv_bytes_of: Literal["prefill", "decode"] = "decode"


@dataclass(frozen=True)
class CodePlace:
    """Where an engine's containers have source code that replaces the image's.

    Attributes:
        path: the directory of the tree.
        package: what the servers import from there.
        of_proxy: what of the tree only the proxy uses; None where it uses none of it at all.
        install: commands of a shell that install it in a server's container; where there are some,
            each container has a copy of its own.
    """

    path: str
    package: str
    of_proxy: tuple[str, ...] | None
    install: tuple[str, ...] = ()

    @property
    def mounted_at(self) -> str:
        """Where a container sees the tree itself."""
        return "/pd-deploy/code" if self.install else self.path


@dataclass(frozen=True)
class MetricsPage:
    """A page of metrics in Prometheus' text format: `address:port` and its path."""

    server: str
    path: str = "/metrics"


PROVING_ADDRESS = "127.77.0.1"
"""Where a proxy listens, at its own port, before it opens to clients: an address of the loopback
network that no client uses, so that only the smoke test asks it, through SSH."""


class Engine(Protocol):
    """What an instance runs, and how it is started, opened and checked."""

    UNUSED_KEYS: tuple[str, ...]
    """Keys of the deployment file that this engine has no use for (`proxy.*.core_num`)."""
    DERIVED_ARGUMENTS: frozenset[str]
    """Arguments that follow from other keys of the file, without their leading dashes."""
    DERIVED_ENVIRONMENT: frozenset[str]
    """Variables that follow from the topology; another value makes pods that can't link."""

    DERIVED_PROXY_ARGUMENTS: frozenset[str]
    """The same of the proxy's arguments."""
    DERIVED_PROXY_ENVIRONMENT: frozenset[str]
    """The same of the proxy's variables."""

    STARTED: str
    """Text in an instance's log once its launcher runs."""
    PREPARED: str
    """Text in the proxy's log once it could be opened."""
    OPEN: str
    """Text in the proxy's log once anybody can connect; the two that follow begin with it."""
    PROVING: str
    """Text in the proxy's log once the smoke test alone can connect."""
    OPENED: str
    """Text in the proxy's log once clients can connect."""
    OPEN_SIGNAL: str
    """Signal that takes a prepared proxy one step on: first it opens to the smoke test alone, at
    `PROVING_ADDRESS`, then to clients."""

    COUNTERS: Counters
    """Where the smoke test sees that KV moved; an image that lacks them makes it not provable."""

    BY_CONTRACT: bool
    """Whether images follow contracts, of which one has to be known before anything is rendered."""
    AT_ONCE: bool
    """Whether prefill and decode get a prompt at the same time, and wait for each other; else
    decode gets it with what prefill answers."""
    HANDOVER_FIELDS: str
    """The fields of a request by which decode finds the KV, for messages."""
    TAKES_TOKEN_IDS: bool
    """Whether the proxy takes a prompt of token ids; servers do in any case."""

    def proxy_metrics(self, deployment: Deployment, proxy: Proxy) -> MetricsPage | None:
        """Say where a proxy shows metrics of its own; return None if nobody else can read them
        there."""

    def shares_port(self, proxy: Proxy, start_script: str) -> bool:
        """Say whether a proxy, as this script starts it, listens at its port with SO_REUSEPORT, so
        that two can at once."""

    def findings(self, deployment: Deployment, topology: Topology) -> Iterator[Finding]:
        """Yield the engine's own rules that a deployment breaks."""

    def probe_command(self) -> list[str]:
        """Return the command that prints, in a throwaway container of an image, what the image is;
        an empty one where nothing depends on that."""

    def parse_probe(self, output: str) -> ImageFacts:
        """Parse what this command printed.

        Raises:
            ValueError: it is no answer; says what it is instead.
        """

    def for_image(self, deployment: Deployment, facts: ImageFacts) -> Deployment:
        """Return a deployment as it is to be rendered for an image with these facts.

        Raises:
            UnknownImage: nobody knows what an image like this expects.
        """

    def image_findings(
        self, deployment: Deployment, topology: Topology, facts: ImageFacts | None
    ) -> Iterator[Finding]:
        """Yield the rules that a deployment breaks with its image, by the image's facts, or as far
        as its name tells while there are none."""

    def code_place(self, deployment: Deployment) -> CodePlace:
        """Say where the containers have the user's own source code."""

    def tensor_parallel(self, role: Literal["prefill", "decode"], devices: Sequence[int]) -> int:
        """Return how many devices share a copy of the model unless the file says so, given the
        numbers of a pod's devices on each of its hosts."""

    def members(
        self,
        deployment: Deployment,
        role: Literal["prefill", "decode"],
        devices: Sequence[int],
        tensor_parallel: int,
    ) -> Sequence[Member]:
        """Say what a pod brings up on each of its hosts, given the numbers of its devices."""

    def zmq_step(self, deployment: Deployment) -> int:
        """Return how many ports lie from a pod's zmq port to the next one's, unless the file gives
        it."""

    def further_ports(
        self,
        deployment: Deployment,
        role: Literal["prefill", "decode"],
        devices: Sequence[int],
        api_ports: Sequence[int],
        settings: Settings,
    ) -> Mapping[str, int]:
        """List ports that a pod binds on one of its hosts besides those that are derived for every
        engine, by purpose, given its devices, API ports and settings there."""

    def read_addresses_command(self, deployment: Deployment, devices: Sequence[int]) -> list[str]:
        """Return the command that prints the network addresses of a host's devices; an empty one
        where the engine needs none."""

    def parse_addresses(self, output: str, devices: Sequence[int], *, host: str) -> dict[int, str]:
        """Parse the device addresses that this command printed.

        Raises:
            FactsError: devices without an address.
        """

    def prefill_request(
        self, prefill: Instance, body: Mapping[str, Any], nonce: str
    ) -> dict[str, Any]:
        """Build the request that makes a prefill keep the KV of a prompt for decode.

        Args:
            nonce: a UUID that no other request has.
        """

    def decode_request(
        self, body: Mapping[str, Any], answer: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Build the request that has decode answer a completion with the KV that prefill's `answer`
        offers; return None if it offers none. Where both are asked `AT_ONCE`, `body` is prefill's
        request, and `answer` is empty."""

    def load_generator(self, deployment: Deployment, topology: Topology) -> LoadGenerator:
        """Return the load generator that its images bring, for benchmarks."""

    def longest_prompt(self, deployment: Deployment, topology: Topology) -> int:
        """Return how many tokens a prompt and its answer may have together."""

    def check_facts(self, deployment: Deployment, facts: Mapping[str, HostFacts]) -> None:
        """Check that what all hosts said fits together, and what the file says of them.

        Raises:
            FactsError: names every host or device that does not fit.
        """

    def cache_busting_fields(self, nonce: str) -> dict[str, Any]:
        """Return fields that keep a request from being answered from a prefix cache."""

    def container(self, service: Service, name: str) -> ContainerSpec:
        """Specify the container of an instance or of a proxy, without pd-deploy's labels."""

    def start_script(self, service: Service, name: str) -> str:
        """Write the script that is the container's main process."""

    def ranktables(self, service: Service) -> Mapping[str, Mapping[str, str]]:
        """Render the files that each host needs before instances start there: host → path →
        content; none where the engine needs none."""

    def starts_after(
        self, deployment: Deployment, topology: Topology, name: str
    ) -> tuple[str, ...]:
        """List the instances that must be started (not ready) before this one."""

    def restarts_with(
        self, deployment: Deployment, topology: Topology, name: str
    ) -> frozenset[str]:
        """List what has to start again together with an instance, itself included: what has linked
        with it while loading, and each proxy that would not ask it again."""

    def device_users_command(self) -> list[str]:
        """Return the command that prints who uses a host's devices; empty if none can."""

    def device_users(self, output: str, devices: Sequence[int], host: str) -> Mapping[int, str]:
        """Parse which of the devices are in use, and by whom, from what this command printed."""

    def device_health_command(self, devices: Sequence[int]) -> list[str]:
        """Return the command that prints how a host's devices are; empty if none can."""

    def faulty_devices(self, output: str, devices: Sequence[int]) -> Mapping[int, str]:
        """Parse which of the devices are out of order, and why, from what this command printed."""

    def device_tools(self, deployment: Deployment) -> DeviceTools | None:
        """Return the tools that tell how its devices and their network are; None if it has none."""

    def command(self, service: Service, name: str) -> list[str]:
        """Return the arguments of what the start script runs in the end."""

    def environment(self, service: Service, name: str) -> dict[str, str]:
        """Return the variables that the start script exports."""
