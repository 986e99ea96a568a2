"""What imported files describe: a service, as the playbook would start it. Pure.

The readers fill it in; `writing` makes a deployment file of it, and `round_trip` compares both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import ContractName
from pd_deploy.importer.report import Place, Report

Role = Literal["prefill", "decode"]
Key = TypeVar("Key")


class Placeholder(ValueError):
    """A value that the files leave open."""


class Argument(NamedTuple):
    """A word of a command, and where it stands; None if only running it would tell the word."""

    text: str | None
    place: Place


@dataclass
class Server:
    """What the playbook starts for an entry of the inventory: one launcher.

    Ports that the files don't give are None. `environment` is what the launcher's process is
    given, `arguments` are vLLM's and the launcher's own switches, by name without dashes.
    `literal` are values of derived flags, as far as they are known, to be verified; `derived` are
    the names of all variables and flags that follow from the topology; `places` say where a value
    stands, by its name in `round_trip.table`.
    """

    name: str
    role: Role
    address: str
    pod: str
    devices: tuple[int, ...]
    place: Place
    kv_rank: int | None = None
    node_rank: int = 0
    master_port: int | None = None
    api_port: int | None = None
    zmq_port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Scalar] = field(default_factory=dict)
    additional_config: dict[str, Any] | None = None
    kv: dict[str, Any] = field(default_factory=dict)
    gpu_memory_utilization: float | None = None
    tensor_parallel: int | None = None
    max_len: int | None = None
    model_path: str | None = None
    served_name: str | None = None
    literal: dict[str, str] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    places: dict[str, Place] = field(default_factory=dict)


@dataclass
class SourceProxy:
    """The proxy that the playbook starts; `arguments` are those without a key of their own."""

    name: str
    address: str
    place: Place
    port: int | None = None
    program: Literal["global", "omni"] = "global"
    log_level: str | None = None
    core_num: int | None = None
    start_core_index: int | None = None
    prefill_lb_sdk: str | None = None
    decode_lb_sdk: str | None = None
    arguments: dict[str, Scalar] = field(default_factory=dict)
    environment: dict[str, Scalar] = field(default_factory=dict)


@dataclass
class Source:
    """A service as the imported files have it, with the report of their lines."""

    report: Report
    place: Place
    servers: list[Server] = field(default_factory=list)
    proxies: list[SourceProxy] = field(default_factory=list)
    image: str | None = None
    contract: ContractName | None = None
    contract_why: str = ""
    logins: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: str | None = None
    code: str | None = None
    http_proxy: str | None = None
    container_names: dict[str, str] = field(default_factory=dict)
    container: dict[str, Any] = field(default_factory=dict)
    interfaces: dict[str, str] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)

    def of(self, role: Role) -> list[Server]:
        """List the servers of a role."""
        return [server for server in self.servers if server.role == role]

    def pods(self, role: Role) -> list[list[Server]]:
        """List the pods of a role, each with its master first, in the order of their ranks."""
        pods: dict[str, list[Server]] = {}
        for server in self.of(role):
            pods.setdefault(server.pod, []).append(server)
        return list(pods.values())


PLACEHOLDERS = ("REPOSITORY:TAG", "IMAGE-REPOSITORY:TAG", "REPLACE_WITH_", "YOU_NAME_", "YOUR_")


def is_placeholder(value: str) -> bool:
    """Tell whether a value is one that the user has to replace before the playbook works."""
    return value.upper().startswith(PLACEHOLDERS) or value.startswith("/path/to/")


@dataclass
class Answers:
    """Values given by `--set NAME=VALUE`, in place of the files' own. `used` are those that a file
    has a place for."""

    values: Mapping[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def get(self, *names: str) -> str | None:
        """Return the answer under the first of some names that has one."""
        for name in names:
            if name in self.values:
                self.used.add(name)
                return self.values[name]
        return None


def as_scalar(text: str) -> Scalar:
    """Return a number for a text that is written as Python writes it, else the text."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if str(number) == text and abs(number) < 1 << 62:
            return number
    return text


def common(values: Iterable[Mapping[Key, Any]]) -> dict[Key, Any]:
    """Return the entries that all of some mappings have with the same value."""
    first, *others = values
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }
