"""Containers and images as values. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

DEPLOYMENT_LABEL = "pd-deploy.deployment"
"""Every container of a deployment carries it; no other one is stopped or removed, but `Adopted`."""


@dataclass(frozen=True)
class Adopted:
    """A container that somebody else has made, and that a deployment was told to take over: this
    one, under this name, and without any deployment's label."""

    id: str
    name: str


Owner = str | Adopted
"""Whose a container has to be before it is touched: a deployment's by its label, or adopted."""


class Mount(BaseModel):
    """A bind mount; the source must exist on the host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    target: str
    read_only: bool = False


class DeviceRequest(BaseModel):
    """GPUs that the Docker engine's driver for them brings in; `count` -1 means all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int


class ContainerSpec(BaseModel):
    """A container to be created.

    `devices` are `/dev/x` or `/dev/x:/dev/y`; `shm_size` is bytes; `stop_timeout` is seconds;
    `log_max_size` is as Docker writes it (`100m`). `entrypoint` None keeps the image's, an empty
    one drops it. `ulimits` are soft and hard limits at once, -1 for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    environment: dict[str, str] = Field(default_factory=dict, repr=False)
    mounts: tuple[Mount, ...] = ()
    devices: tuple[str, ...] = ()
    device_requests: tuple[DeviceRequest, ...] = ()
    privileged: bool = False
    cap_add: tuple[str, ...] = ()
    ulimits: dict[str, int] = Field(default_factory=dict)
    shm_size: int | None = None
    network_mode: str = "host"
    ipc_mode: str | None = None
    user: str | None = None
    working_dir: str | None = None
    init: bool = True
    tty: bool = False
    stop_signal: str | None = None
    stop_timeout: int | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    log_max_size: str = "100m"
    log_max_file: int = 3


@dataclass(frozen=True)
class ContainerState:
    """A container as it is. `status` is Docker's: created, running, exited, dead …

    `finished_at` is when it last ended, also when it runs again: its output since then is of the
    present run.
    """

    id: str
    name: str
    labels: dict[str, str]
    status: str
    exit_code: int | None
    started_at: datetime | None
    finished_at: datetime | None
    image: str
    oom_killed: bool = False
    error: str = ""
    image_id: str = ""

    @property
    def running(self) -> bool:
        """Whether its main process runs."""
        return self.status in ("running", "paused")

    @property
    def run(self) -> str:
        """Tells this run of the container, or its last, from all others."""
        return f"{self.id} {self.started_at}"


@dataclass(frozen=True)
class ListedContainer:
    """A container of whoever, as the engine lists it."""

    id: str
    name: str
    labels: dict[str, str]
    status: str
    image: str

    def __str__(self) -> str:
        return f"{self.name} ({self.id[:12]}, image {self.image}, {self.status})"


@dataclass(frozen=True)
class Image:
    """An image on a host; `digest` is `repository@sha256:…`, None if it never saw a registry.

    `architecture` is what its programs are for, in the names of OCI (`amd64`, `arm64`), empty
    where the image does not say.
    """

    id: str
    digest: str | None
    tags: tuple[str, ...] = ()
    architecture: str = ""


# The engine names its machine as the kernel does, an image's platform as OCI does.
_OCI_NAMES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def oci_architecture(machine: str) -> str:
    """OCI's name for a machine as `uname -m` names it."""
    return _OCI_NAMES.get(machine, machine)


@dataclass(frozen=True)
class DockerInfo:
    """The Docker engine of a host; `architecture` is the machine's, in the names of OCI.

    `is_rootless` says that its containers' host network is one of its own; that of a rootless
    Podman is the host's.
    """

    version: str
    root_dir: str
    architecture: str
    remaps_users: bool = False
    is_rootless: bool = False


@dataclass(frozen=True)
class RegistryLogin:
    """Credentials for a registry; they go with each pull and are stored nowhere on the host."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class PullProgress:
    """How far a pull is; sizes in bytes, of the layers whose size is known so far. Of an archive,
    which is sent as a whole, no layers are known."""

    layers_done: int
    layers: int
    bytes_done: int
    bytes_total: int


def state_of(inspected: Mapping[str, Any]) -> ContainerState:
    """Read a container's state from the Engine API's inspect answer."""
    state, config = inspected["State"], inspected["Config"]
    over = state["Status"] in ("exited", "dead")
    return ContainerState(
        id=inspected["Id"],
        name=inspected["Name"].lstrip("/"),
        labels=dict(config.get("Labels") or {}),
        status=state["Status"],
        exit_code=state["ExitCode"] if over else None,
        started_at=_time(state.get("StartedAt")),
        finished_at=_time(state.get("FinishedAt")),
        image=config["Image"],
        oom_killed=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        image_id=inspected.get("Image") or "",
    )


def listed(entry: Mapping[str, Any]) -> ListedContainer:
    """Read a container from an entry of the Engine API's list."""
    return ListedContainer(
        id=entry["Id"],
        name=(entry.get("Names") or [entry["Id"][:12]])[0].lstrip("/"),
        labels=dict(entry.get("Labels") or {}),
        status=entry["State"],
        image=entry["Image"],
    )


def image_of(inspected: Mapping[str, Any], repository: str) -> Image:
    """Read an image from the Engine API's inspect answer; its digest is that in `repository`."""
    digests = inspected.get("RepoDigests") or []
    in_repository = [digest for digest in digests if digest.split("@")[0] == repository]
    return Image(
        id=inspected["Id"],
        digest=in_repository[0] if in_repository else None,
        tags=tuple(inspected.get("RepoTags") or ()),
        architecture=inspected.get("Architecture") or "",
    )


class PullMeter:
    """Adds up the engine's messages about a pull."""

    def __init__(self) -> None:
        self.digest: str | None = None
        self._layers: dict[str, tuple[int, int, bool]] = {}

    def read(self, message: Mapping[str, Any]) -> PullProgress:
        """Take one message of the engine; how far the pull is then."""
        status, layer = message.get("status", ""), message.get("id")
        if status.startswith("Digest: "):
            self.digest = status.removeprefix("Digest: ").strip()
        if layer and not status.startswith("Pulling from"):
            self._layers[layer] = self._layer(layer, status, message.get("progressDetail") or {})
        return self.progress

    @property
    def progress(self) -> PullProgress:
        """How far the pull is."""
        layers = self._layers.values()
        return PullProgress(
            layers_done=sum(done for *_, done in layers),
            layers=len(layers),
            bytes_done=sum(now for now, *_ in layers),
            bytes_total=sum(total for _, total, _ in layers),
        )

    def _layer(self, layer: str, status: str, detail: Mapping[str, int]) -> tuple[int, int, bool]:
        now, total, _ = self._layers.get(layer, (0, 0, False))
        if status == "Downloading":
            return detail.get("current", now), detail.get("total", total), False
        if status in ("Download complete", "Pull complete", "Already exists"):
            return total, total, status != "Download complete"
        return now, total, False


def _time(text: str | None) -> datetime | None:
    # Docker writes year 1 for "never".
    return datetime.fromisoformat(text) if text and not text.startswith("0001-") else None
