"""The plug-in point: what an engine has to say about a service. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pd_deploy.deployment import Deployment
from pd_deploy.hosts import ContainerSpec
from pd_deploy.topology import Topology


@dataclass(frozen=True)
class HostFacts:
    """What the engine needs to know of a host: the interface that owns its address, and the
    network address of each device."""

    interface: str
    device_addresses: Mapping[int, str]


@dataclass(frozen=True)
class Layout:
    """Where the files of one generation lie, the same on every host."""

    deployment: str
    generation: str
    state: str
    logs: str

    @classmethod
    def of(cls, deployment: Deployment, generation: str) -> "Layout":
        """The layout of a deployment's generation, as the file's paths give it."""
        return cls(deployment.name, generation, deployment.paths.state, deployment.paths.logs)

    @staticmethod
    def root_of(deployment: Deployment) -> str:
        """All that pd-deploy writes for a deployment, but for logs."""
        return f"{deployment.paths.state}/{deployment.name}"

    @staticmethod
    def log_root_of(deployment: Deployment) -> str:
        """All logs of a deployment."""
        return f"{deployment.paths.logs}/{deployment.name}"

    @property
    def directory(self) -> str:
        """All that pd-deploy writes for this generation."""
        return f"{self.state}/{self.deployment}/{self.generation}"

    @property
    def ranktables(self) -> str:
        """The ranktable documents."""
        return f"{self.directory}/ranktables"

    def start_script(self, name: str) -> str:
        """The main process of an instance."""
        return f"{self.directory}/{name}/start.sh"

    @property
    def log_root(self) -> str:
        """Parent of the instances' log directories."""
        return f"{self.logs}/{self.deployment}/{self.generation}"

    def log_directory(self, name: str) -> str:
        """Log files of one instance."""
        return f"{self.log_root}/{name}"


@dataclass(frozen=True)
class Service:
    """All that an engine is given: the service, where it lies, and what the hosts said."""

    deployment: Deployment
    topology: Topology
    layout: Layout
    facts: Mapping[str, HostFacts]
    image: str


class Engine(Protocol):
    """What an instance runs, and how it is started, opened and checked."""

    STARTED: str
    """Text in an instance's log once its launcher runs."""
    PREPARED: str
    """Text in the proxy's log once it could be opened."""
    OPENED: str
    """Text in the proxy's log once clients can connect."""
    OPEN_SIGNAL: str
    """Signal that opens a prepared proxy."""

    def container(self, service: Service, name: str) -> ContainerSpec:
        """The container of an instance or of the proxy, without pd-deploy's labels."""

    def start_script(self, service: Service, name: str) -> str:
        """The script that is the container's main process."""

    def ranktables(self, service: Service, host: str) -> Mapping[str, bytes]:
        """Files that must lie on a host before an instance starts there: path → content."""

    def starts_after(self, topology: Topology, name: str) -> tuple[str, ...]:
        """Instances that must be started (not ready) before this one."""

    def users_command(self) -> list[str]:
        """What to run on a host to see who uses its devices; nothing where that can't be told."""

    def users(self, output: str, devices: Sequence[int], host: str) -> Mapping[int, str]:
        """Those of the devices that somebody uses, and who, from the output of that command."""

    def command(self, service: Service, name: str) -> list[str]:
        """What the start script runs in the end."""

    def environment(self, service: Service, name: str) -> dict[str, str]:
        """What the start script exports."""
