"""The deployment file: what runs where, as typed, frozen models.

`load` reads a file, lays it on its profile and reports everything that is wrong with it at once;
no host is touched.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from pd_deploy import documents
from pd_deploy.errors import InvalidInput, Problem

PROFILES = Path(__file__).parent / "profiles"
MAX_DEVICES = 64
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

Role = Literal["prefill", "decode", "proxy"]
EngineName = Literal["omniinfer"]
Scalar = str | int | float | bool


class Model(BaseModel):
    """Base of all models of the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_devices(value: object) -> tuple[int, ...]:
    """Device ids from `0-7`, `0,2,4-6`, `[0, 1]` or `3`, in the order given.

    Raises:
        ValueError: not numbers, a reversed range, a device twice, or an id of 64 and above.
    """
    if isinstance(value, bool):
        raise ValueError(f"expected device ids such as 0-7, found {value!r}")
    if isinstance(value, int):
        parts: Sequence[object] = [value]
    elif isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
    elif isinstance(value, list | tuple):
        parts = value
    else:
        raise ValueError(f"expected device ids such as 0-7, found {value!r}")
    devices = [device for part in parts for device in _device_range(part)]
    twice = sorted({d for d in devices if devices.count(d) > 1})
    if twice:
        raise ValueError(f"device {', '.join(map(str, twice))} is given twice")
    if not devices:
        raise ValueError("expected at least one device")
    return tuple(devices)


def _device_range(part: object) -> range:
    match = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", str(part), re.ASCII)
    if isinstance(part, bool) or not match:
        raise ValueError(f"expected device ids such as 0-7 or 0,1,2, found {part!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"the range {part!r} runs backwards; write {last}-{first}")
    if last >= MAX_DEVICES:
        raise ValueError(f"expected device ids below {MAX_DEVICES}, found {last}")
    return range(first, last + 1)


def parse_size(value: object) -> int:
    """Bytes from `500g`, `64m`, `1024k` or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15})([kmg]?)b?", str(value).strip().lower(), re.ASCII)
    if isinstance(value, bool) or not match:
        raise ValueError(f"expected a size such as 500g, found {value!r}")
    return int(match[1]) * _UNITS[match[2]]


def _parse_mount(value: object) -> object:
    """A mount from `/host/path`, `/host/path:/container/path` or the same with `:ro`."""
    if not isinstance(value, str):
        return value
    source, _, rest = value.partition(":")
    target, _, mode = rest.partition(":")
    if target in ("ro", "rw") and not mode:
        target, mode = "", target
    if mode not in ("", "ro", "rw"):
        raise ValueError(f"expected SOURCE[:TARGET][:ro], found {value!r}")
    return {"source": source, "target": target or source, "read_only": mode == "ro"}


def _absolute(value: str) -> str:
    if not value.startswith("/") or os.path.normpath(value) != value or value == "/":
        raise ValueError(
            f"expected an absolute path without '..' or a trailing '/', found {value!r}"
        )
    return value


def _ipv4(value: object) -> object:
    try:
        return str(IPv4Address(value)) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(
            f"expected an IPv4 address (ranktables hold nothing else), found {value!r}"
        ) from error


def _host_from_address(value: object) -> object:
    return {"address": value} if isinstance(value, str) else value


Name = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?$", strict=True)
]
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$", strict=True)]
AbsolutePath = Annotated[Text, AfterValidator(_absolute)]
Address = Annotated[str, BeforeValidator(_ipv4)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]
Devices = Annotated[tuple[int, ...], BeforeValidator(parse_devices)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Environment = dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Scalar]


class ModelSource(Model):
    """The model that is served and the longest sequence each side accepts, in tokens."""

    path: AbsolutePath
    served_name: Text
    max_len_prefill: Annotated[int, Field(gt=0, strict=True)]
    max_len_decode: Annotated[int, Field(gt=0, strict=True)]


class Ssh(Model):
    """How the hosts are reached. `credentials` names a Prefect block; without it the user's agent
    and ~/.ssh/config serve."""

    user: Text | None = None
    port: Port = 22
    credentials: Text | None = None


class Registry(Model):
    """Where the image comes from. `host` replaces the registry named in `image`."""

    host: Text | None = None
    credentials: Text | None = None


class HostEntry(Model):
    """A machine. `interface` is found from the address unless it is given."""

    address: Address
    interface: Text | None = None
    ssh: Ssh | None = None


class Settings(Model):
    """Tuning of the instances of a role, or of one instance. What is not given comes from the
    level below: profile, then `settings`, then the instance."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    tensor_parallel: Annotated[int, Field(gt=0, strict=True)] | None = None
    environment: Environment = {}
    arguments: dict[
        Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-_]*$")], Scalar
    ] = {}
    additional_config: dict[str, Any] | None = None


class InstanceEntry(Settings):
    """One engine instance: where it runs, and what differs from its role's settings."""

    host: Name
    devices: Devices


class ProxyEntry(Model):
    """The proxy that clients talk to."""

    host: Name
    port: Annotated[int, Field(ge=1024, le=65500, strict=True)] = 7000
    core_num: Annotated[int, Field(ge=1, le=64, strict=True)] = 4
    start_core_index: Annotated[int, Field(ge=0, le=1023, strict=True)] = 16
    prefill_lb_sdk: Text = "pd_score_balance"
    decode_lb_sdk: Text = "pd_score_balance"
    log_level: Literal["debug", "info", "notice", "warn", "error", "crit", "alert", "emerg"] = (
        "notice"
    )
    nginx_tarball: AbsolutePath | None = Field(
        default=None, description="nginx sources on the host, for an image without nginx"
    )


class Ports(Model):
    """First port of each kind; instances count up from there (contract section 1.2)."""

    master: Port = 8000
    api: Port = 9000
    zmq: Port = 5568
    decode_offset: Annotated[int, Field(ge=1, le=10000, strict=True)] = 100


class Paths(Model):
    """Directories on the hosts; `state` and `logs` get one per deployment and generation below."""

    state: AbsolutePath = "/var/lib/pd-deploy"
    logs: AbsolutePath = "/data/log_path"


class MountEntry(Model):
    """A path of the host made visible in the containers."""

    source: AbsolutePath
    target: AbsolutePath
    read_only: bool = False


class ContainerNames(Model):
    """What container names begin with; instance and generation follow."""

    prefill: Name = "omni-infer-prefill"
    decode: Name = "omni-infer-decode"
    proxy: Name = "omni-infer-proxy"


class ContainerOptions(Model):
    """How the containers are made. The defaults are those of contract section 2.1."""

    names: ContainerNames = ContainerNames()
    privileged: bool = True
    shm_size: Annotated[int, BeforeValidator(parse_size)] = 500 << 30
    devices: tuple[AbsolutePath, ...] = (
        "/dev/davinci_manager",
        "/dev/hisi_hdc",
        "/dev/devmm_svm",
    )
    mounts: tuple[Annotated[MountEntry, BeforeValidator(_parse_mount)], ...] = tuple(
        MountEntry(source=path, target=path)
        for path in (
            "/data",
            "/usr/local/Ascend/driver",
            "/usr/local/dcmi",
            "/usr/local/bin/npu-smi",
            "/etc/ascend_install.info",
            "/usr/local/sbin",
            "/etc/hccn.conf",
            "/usr/bin/hccn_tool",
        )
    )
    time_zone: Annotated[
        str, StringConstraints(pattern=r"^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$")
    ] = "Asia/Shanghai"
    stop_timeout: Annotated[int, Field(ge=1, le=3600)] = 60


class Gates(Model):
    """How long each wait may last, in seconds."""

    connect: Seconds = 10
    pull: Seconds = 3600
    prepare_proxy: Seconds = 900
    start: Seconds = 60
    ready: Seconds = 1800
    smoke: Seconds = 120


class Smoke(Model):
    """The completion that proves the service."""

    prompt: Text = "how are you?"
    max_tokens: Annotated[int, Field(gt=0, le=4096)] = 50


KvParallelSize = Literal["prefill-pods-plus-one", "decode-tensor-parallel"]


class Deployment(Model):
    """A whole service: the deployment file laid on its profile."""

    name: Name
    engine: EngineName
    profile: Name
    image: Text
    pull: Literal["always", "never"] = "always"
    model: ModelSource
    ssh: Ssh = Ssh()
    registry: Registry = Registry()
    hosts: Annotated[
        dict[Name, Annotated[HostEntry, BeforeValidator(_host_from_address)]], Field(min_length=1)
    ]
    prefill: Annotated[dict[Name, InstanceEntry], Field(min_length=1)]
    decode: Annotated[dict[Name, InstanceEntry], Field(min_length=1)]
    proxy: Annotated[dict[Name, ProxyEntry], Field(min_length=1, max_length=1)]
    settings: dict[Literal["all", "prefill", "decode"], Settings] = {}
    code: Literal["image"] | AbsolutePath = "image"
    http_proxy: Text | None = None
    ports: Ports = Ports()
    paths: Paths = Paths()
    container: ContainerOptions = ContainerOptions()
    gates: Gates = Gates()
    smoke: Smoke = Smoke()
    kv_parallel_size: KvParallelSize
    devices_per_host: Annotated[int, Field(gt=0, le=MAX_DEVICES, strict=True)]
    profile_settings: dict[Literal["all", "prefill", "decode"], Settings] = Field(exclude=True)

    @model_validator(mode="after")
    def _placed_on_known_hosts(self) -> "Deployment":
        problems = [
            f"{group}.{name}.host: expected one of {', '.join(self.hosts)}, found {entry.host}"
            for group in ("prefill", "decode", "proxy")
            for name, entry in getattr(self, group).items()
            if entry.host not in self.hosts
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def image_reference(self) -> str:
        """The image, from the registry that serves it here."""
        if self.registry.host is None:
            return self.image
        first, slash, rest = self.image.partition("/")
        names_registry = bool(slash) and ("." in first or ":" in first or first == "localhost")
        return f"{self.registry.host}/{rest if names_registry else self.image}"

    def settings_of(self, role: Literal["prefill", "decode"], entry: InstanceEntry) -> Settings:
        """What applies to one instance: profile, then file, then the instance itself."""
        levels = [
            levels_of[key]
            for levels_of in (self.profile_settings, self.settings)
            for key in ("all", role)
            if key in levels_of
        ]
        merged: Mapping[str, Any] = {}
        for level in (*levels, entry):
            merged = documents.merge(
                merged, level.model_dump(include=set(Settings.model_fields), exclude_unset=True)
            )
        return Settings.model_validate(merged)


def load(path: Path, *, image: str | None = None) -> Deployment:
    """The deployment that a file describes, with `image` in place of the file's own if given.

    Raises:
        InvalidInput: all that is wrong with the file, each with the path of its key.
    """
    document = documents.read(path)
    if image is not None:
        document["image"] = image
    return parse(document, file=str(path))


def parse(document: Mapping[str, Any], *, file: str = "deployment") -> Deployment:
    """The deployment that a mapping describes; see `load`."""
    try:
        return Deployment.model_validate(_on_profile(document, file))
    except ValidationError as error:
        raise InvalidInput(problems_of(error), source=file) from error


def profiles() -> list[str]:
    """Names of the profiles that come with pd-deploy."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def _on_profile(document: Mapping[str, Any], file: str) -> dict[str, Any]:
    name = document.get("profile")
    if name not in profiles():
        expected = ", ".join(profiles())
        raise InvalidInput(
            [Problem("profile", f"expected one of {expected}, found {name!r}")], source=file
        )
    profile = documents.read(PROFILES / f"{name}.yaml")
    settings = {key: profile.pop(key) for key in ("all", "prefill", "decode") if key in profile}
    given = [key for key in ("profile_settings",) if key in document]
    if given:
        raise InvalidInput([Problem(given[0], "is not a key of a deployment file")], source=file)
    return {**documents.merge(profile, document), "profile_settings": settings}


def problems_of(error: ValidationError) -> list[Problem]:
    """A validation error as problems with key paths, unknown keys with their nearest known one."""
    problems = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("function-"))
        if detail["type"] == "extra_forbidden":
            message = _unknown_key(detail["loc"])
        elif detail["type"] == "missing":
            message = "is missing"
        else:
            message = _found(detail["msg"].removeprefix("Value error, "), detail["input"])
        problems.append(Problem(key, message))
    return problems


def _found(message: str, value: object) -> str:
    if "found" in message:
        return message
    shown = repr(value)
    return f"{message}, found {shown if len(shown) < 80 else shown[:77] + '...'}"


def _unknown_key(location: tuple[int | str, ...]) -> str:
    known = _known_keys(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return (
        f"is not a known key; did you mean {near[0]}?"
        if near
        else (
            f"is not a known key; known are {', '.join(known)}" if known else "is not a known key"
        )
    )


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the model at a place in the file."""
    model: Any = Deployment
    for part in location:
        field = model.model_fields.get(part) if _is_model(model) else None
        model = _model_in(field.annotation) if field else model
        if model is None:
            return []
    return [key for key in model.model_fields if key != "profile_settings"]


def _model_in(annotation: Any) -> Any:
    if _is_model(annotation):
        return annotation
    found = (_model_in(arg) for arg in get_args(annotation))
    return next((model for model in found if model), None)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
