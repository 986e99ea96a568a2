"""The deployment file: what runs where, as typed, frozen models.

`load` reads a file, lays it on its profile and reports everything that is wrong with it at once;
no host is touched.
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from pd_deploy.config import yaml_files as documents
from pd_deploy.config.rule_names import RULES
from pd_deploy.errors import InvalidInput, Problem

PROFILES = Path(__file__).parent / "profiles"
MAX_DEVICES = 64
# What pydantic calls its findings, in words for the file's author.
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "mapping_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} entry",
    "too_long": "at most {max_length} entry",
    "invalid_key": "a key that is text",
}
# Keys of the model that no document gives: they come from the profile's own.
_DERIVED = ("profile_settings", "upstream_source")
# Keys of profiles that no deployment file may have.
_OF_PROFILES = (*_DERIVED, "all", "upstream")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

EngineName = Literal["omniinfer", "vllm"]
Scalar = str | int | float | bool


class Model(BaseModel):
    """Base of all models of the file: frozen, and an unknown key is an error."""

    # Inputs stay out of pydantic's own messages: they may hold what should not be in the file.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


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
        raise ValueError(
            f"expected each device once, found {', '.join(map(str, twice))} more than once"
        )
    if not devices:
        raise ValueError("expected at least one device")
    return tuple(devices)


def parse_pod_devices(value: object) -> object:
    """Device ids, or a mapping of hosts to device ids; see `parse_devices`."""
    if isinstance(value, Mapping):
        odd = [host for host in value if not isinstance(host, str)]
        if odd:
            raise ValueError(f"expected hosts of the file, found {_shown(odd[0])}")
        return {host: parse_devices(devices) for host, devices in value.items()}
    return parse_devices(value)


def _device_range(part: object) -> range:
    match = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", str(part), re.ASCII)
    if isinstance(part, bool) or not match:
        raise ValueError(f"expected device ids such as 0-7 or 0,1,2, found {part!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"expected a range that runs upwards, {last}-{first}, found {part!r}")
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


# Networks that hold no address of a machine → what they are instead. The first that fits counts.
_NOT_OF_A_HOST = {
    IPv4Network("0.0.0.0/8"): "stands for no machine, or for all addresses of this one",
    IPv4Network("127.0.0.0/8"): "is a machine's own loopback, which no other machine can reach",
    IPv4Network("224.0.0.0/4"): "is a multicast address, for groups of machines",
    IPv4Network("255.255.255.255/32"): "is the broadcast address, for all machines of a network",
    IPv4Network("240.0.0.0/4"): "is reserved; no machine has it",
}


def _of_a_host(address: str) -> str:
    for network, what in _NOT_OF_A_HOST.items():
        if IPv4Address(address) in network:
            raise ValueError(
                f"expected the address at which the other hosts reach this one, found {address}, "
                f"which {what}"
            )
    return address


def _host_from_address(value: object) -> object:
    return {"address": value} if isinstance(value, str) else value


def _like(pattern: str, expected: str) -> BeforeValidator:
    """Text of a given form; `expected` describes the form to people."""

    def check(value: object) -> object:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"expected {expected}, found {_shown(value)}")
        return value

    return BeforeValidator(check)


def _scalar(value: object) -> object:
    if not isinstance(value, str | int | float):
        raise ValueError(f"expected text, a number, true or false, found {_shown(value)}")
    if "\0" in str(value):
        raise ValueError(f"expected text without NUL characters, found {_shown(value)}")
    return value


def _without_login(pattern: str) -> BeforeValidator:
    """Refuses text with a user or password where `pattern` looks; the message never repeats it."""

    def check(value: object) -> object:
        if isinstance(value, str) and re.search(pattern, value):
            raise ValueError("expected no user or password in the file, found some (not shown)")
        return value

    return BeforeValidator(check)


def _json(value: object) -> object:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected values that JSON can hold, found another: {error}") from error
    return value


def _kv_parallel_size(value: object) -> object:
    known = ("by-image", "prefill-pods-plus-one", "decode-tensor-parallel")
    number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not number and value not in known:
        raise ValueError(f"expected {', '.join(known)} or a number, found {_shown(value)}")
    return value


def _engine_id(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not number and value != "kv-rank":
        raise ValueError(f"expected kv-rank or a number from 0 on, found {_shown(value)}")
    return value


def _rule(value: object) -> object:
    if not isinstance(value, str) or value not in RULES:
        near = difflib.get_close_matches(str(value), RULES, n=1)
        expected = f"did you mean {near[0]}?" if near else f"known are {', '.join(RULES)}"
        raise ValueError(f"expected the name of a rule, found {_shown(value)}; {expected}")
    return value


def _group(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"expected the name or number of a group, found {_shown(value)}")
    return value


def _given_with(info: ValidationInfo, family: str, value: str | None, expected: str) -> None:
    """Whether a key that only one family has is given with it, and with no other."""
    found = info.data.get("family")
    if found is None:
        return  # Wrong itself; one problem is enough.
    if found == family and value is None:
        raise ValueError(f"expected {expected}, because the family is {family}; found none")
    if found != family and value is not None:
        raise ValueError(
            f"expected none, because the family is {found} and not {family}, found {_shown(value)}"
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"expected a regular expression, found {_shown(pattern)} ({error})"
        ) from error


def _pattern(value: str | None) -> str | None:
    if value is not None:
        _compiled(value)
    return value


def _prompt_tokens(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is not None and value != "limit" and not number:
        raise ValueError(f"expected `limit` or a number of tokens, found {_shown(value)}")
    return value


def _code(value: object) -> object:
    if value == "image":
        return value
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError(
            f"expected `image` (the code in the image) or an absolute path, found {_shown(value)}"
        )
    return _absolute(value)


def _shown(value: object) -> str:
    shown = reprlib.repr(value)
    return shown if len(shown) < 80 else shown[:77] + "..."


Name = Annotated[
    str,
    _like(
        r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?",
        "small letters, digits and '-' (at most 40, no '-' at either end)",
    ),
]
ContainerName = Annotated[
    str,
    _like(
        r"[A-Za-z0-9][A-Za-z0-9_.-]{1,63}",
        "letters, digits, '_', '.' and '-' (2 to 64, the first a letter or digit)",
    ),
]
Text = Annotated[
    str, _like(r"(?s:[^\x00-\x1f\x7f]+)", "text that is not empty, without control characters")
]
Word = Annotated[str, _like(r"[^\x00-\x20\x7f]+", "text without blanks")]
Image = Annotated[
    str,
    _like(
        r"[^\s:@]([^\s@]*[^\s:@])?(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})",
        "an image with a tag or a digest, NAME:TAG or NAME@sha256:…",
    ),
]
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
REPOSITORY = rf"{_COMPONENT}(?:/{_COMPONENT})*"  # a repository's path in its registry
RepositoryName = Annotated[
    str,
    _like(
        rf"(?:[A-Za-z0-9.-]+(?::\d{{1,5}})?/)?{REPOSITORY}",
        "a repository without a tag, such as omni-ci/daily_omniinfer",
    ),
]
AbsolutePath = Annotated[Text, AfterValidator(_absolute)]
Address = Annotated[str, BeforeValidator(_ipv4)]
HostAddress = Annotated[Address, AfterValidator(_of_a_host)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]
PodDevices = Annotated[
    tuple[int, ...] | dict[str, tuple[int, ...]], BeforeValidator(parse_pod_devices)
]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Value = Annotated[Scalar, BeforeValidator(_scalar), _without_login(r"://[^/@]*@")]
Environment = dict[
    Annotated[str, _like(r"[A-Za-z_][A-Za-z0-9_]*", "letters, digits and '_'")], Value
]


Arguments = dict[
    Annotated[str, _like(r"[a-z0-9][a-z0-9_-]*", "an option without its leading dashes")], Value
]


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
    """Where the image comes from. `host` replaces the registry named in `image`.

    `insecure` (plain HTTP) and `ca` (a file on the controller) are for asking which tags there
    are; the hosts' engines have settings of their own for both.
    """

    host: Annotated[Word | None, _without_login(r"^([^/]*://)?[^/]*@")] = None
    credentials: Text | None = None
    insecure: bool = False
    ca: AbsolutePath | None = None

    @model_validator(mode="after")
    def _one_way_to_trust(self) -> "Registry":
        if self.insecure and self.ca:
            raise ValueError("expected either `insecure` or `ca`, found both")
        return self


class UpdatePolicy(Model):
    """Which of a repository's tags count as newer builds of what runs, and their order.

    The families are those of `pd_deploy.tags`. `branch` is that of a branch-daily, `pattern` and
    `order` (names or numbers of its groups, the weightiest first) are those of a pattern.
    """

    family: Literal["daily", "branch-daily", "timestamp", "date", "release", "pattern"]
    repository: RepositoryName | None = None
    branch: Annotated[str | None, Field(validate_default=True)] = None
    pattern: Annotated[str | None, Field(validate_default=True)] = None
    order: tuple[Annotated[int | str, BeforeValidator(_group)], ...] = ()

    @field_validator("branch")
    @classmethod
    def _branch_of_its_family(cls, value: str | None, info: ValidationInfo) -> str | None:
        _given_with(info, "branch-daily", value, "a branch such as master")
        if value is not None and not re.fullmatch(r"\w[\w.-]{0,99}", value, re.ASCII):
            raise ValueError(f"expected a branch as it stands in tags, found {_shown(value)}")
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_to_compare_by(cls, value: str | None, info: ValidationInfo) -> str | None:
        _given_with(info, "pattern", value, r"a regular expression such as build-(\d+)")
        if value is not None and not _compiled(value).groups:
            raise ValueError(
                r"expected groups to compare tags by, as in build-(\d+), "
                f"found none in {_shown(value)}"
            )
        return value

    @field_validator("order")
    @classmethod
    def _groups_of_the_pattern(
        cls, value: tuple[int | str, ...], info: ValidationInfo
    ) -> tuple[int | str, ...]:
        pattern = info.data.get("pattern")
        if not value or "pattern" not in info.data or "family" not in info.data:
            return value
        if pattern is None:
            raise ValueError("expected no `order` without a `pattern`, found one")
        groups = _compiled(pattern)
        known = [*groups.groupindex, *range(1, groups.groups + 1)]
        odd = [group for group in value if group not in known]
        if odd or len(set(value)) < len(value):
            names = ", ".join(map(str, known))
            found = ", ".join(map(str, value))
            raise ValueError(f"expected groups of the pattern ({names}), each once, found {found}")
        return value


class HostEntry(Model):
    """A machine. `interface` is found from the address unless it is given."""

    address: HostAddress
    interface: Text | None = None
    ssh: Ssh | None = None


class MountEntry(Model):
    """A path of the host made visible in the containers."""

    source: AbsolutePath
    target: AbsolutePath
    read_only: bool = False


MountEntries = tuple[Annotated[MountEntry, BeforeValidator(_parse_mount)], ...]


class Settings(Model):
    """Tuning of the instances of a role, or of one instance. What is not given comes from the
    level below: profile, then `settings`, then the instance. Mounts and container devices of all
    levels add up; they come on top of `container`'s, and a mount replaces one of its target."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    tensor_parallel: Annotated[int, Field(gt=0, strict=True)] | None = None
    environment: Environment = {}
    arguments: Arguments = {}
    additional_config: Annotated[dict[str, Any] | None, BeforeValidator(_json)] = None
    mounts: MountEntries = ()
    container_devices: tuple[AbsolutePath, ...] = ()


class InstanceEntry(Settings):
    """One pod: where it runs, and what differs from its role's settings.

    On several hosts (`hosts`, the master first) it is one engine with an instance on each.
    `devices` are those of every host, or differ by host in a mapping.
    """

    host: Name | None = None
    hosts: Annotated[tuple[Name, ...] | None, Field(min_length=1)] = None
    devices: PodDevices

    @model_validator(mode="after")
    def _placed_once(self) -> "InstanceEntry":
        if (self.host is None) == (self.hosts is None):
            raise ValueError("expected either `host` or `hosts`, found " + self._given())
        twice = sorted({host for host in self.on if self.on.count(host) > 1})
        if twice:
            raise ValueError(f"expected each of its hosts once, found {', '.join(twice)} again")
        if isinstance(self.devices, Mapping) and set(self.devices) != set(self.on):
            raise ValueError(
                f"expected devices for its hosts ({', '.join(self.on)}), "
                f"found them for {', '.join(self.devices) or 'none'}"
            )
        return self

    def _given(self) -> str:
        return "neither" if self.host is None else "both"

    @property
    def on(self) -> tuple[str, ...]:
        """Its hosts, the master first."""
        return self.hosts or (self.host or "",)

    def devices_on(self, host: str) -> tuple[int, ...]:
        """Its devices on one of its hosts."""
        return self.devices[host] if isinstance(self.devices, Mapping) else self.devices


class ProxyEntry(Model):
    """The proxy that clients talk to.

    `arguments` and `environment` are for its program: the image's script, or the router.
    """

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
    environment: Environment = {}
    arguments: Arguments = {}


class Ports(Model):
    """First port of each kind; instances count up from there (contract section 1.2)."""

    master: Port = 8000
    api: Port = 9000
    zmq: Port = 5568
    zmq_step: Annotated[int, Field(ge=1, le=256, strict=True)] = 1
    ray: Port = 6379
    decode_offset: Annotated[int, Field(ge=1, le=10000, strict=True)] = 100


class Paths(Model):
    """Directories on the hosts; `state` and `logs` get one per deployment and generation below."""

    state: AbsolutePath = "/var/lib/pd-deploy"
    logs: AbsolutePath = "/data/log_path"


class ContainerNames(Model):
    """What container names begin with; instance and generation follow."""

    prefill: ContainerName = "omni-infer-prefill"
    decode: ContainerName = "omni-infer-decode"
    proxy: ContainerName = "omni-infer-proxy"


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
    mounts: MountEntries = tuple(
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
    gpus: Literal["all"] | None = None
    cap_add: tuple[Annotated[str, _like(r"[A-Z_]+", "a capability such as IPC_LOCK")], ...] = ()
    ulimits: dict[
        Annotated[str, _like(r"[a-z]+", "a limit such as memlock")],
        Annotated[int, Field(ge=-1, strict=True)],
    ] = {}
    time_zone: Annotated[
        str, _like(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", "a time zone such as Asia/Shanghai")
    ] = "Asia/Shanghai"
    stop_timeout: Annotated[int, Field(ge=1, le=3600)] = 60


class Gates(Model):
    """How long each wait may last, in seconds.

    `lease` is how long a run waits for another one that works on the deployment, `lease_lasts`
    after how long without a sign of life that one is given up for dead.
    """

    connect: Seconds = 10
    lease: Seconds = 60
    lease_lasts: Annotated[int, Field(ge=2, le=3600, strict=True)] = 30
    pull: Seconds = 3600
    free: Seconds = 120
    prepare_proxy: Seconds = 900
    start: Seconds = 60
    ready: Seconds = 1800
    smoke: Seconds = 120


class Disk(Model):
    """Room that a host must have before anything stops: for an image that it has not yet, and for
    logs. In bytes, or as `40g`."""

    image: Annotated[int, BeforeValidator(parse_size)] = 40 << 30
    logs: Annotated[int, BeforeValidator(parse_size)] = 1 << 30


class SmokeCheck(Model):
    """A request through the proxy, and what its answer has to match.

    Exactly one of `prompt` (a text), `chat` (a user's message) and `prompt_tokens` (a prompt of so
    many tokens, or `limit` for the longest that the service can serve) says what is asked.
    `expect` is a regular expression that has to be found in the answer's text; without it only its
    form is judged. A `prompt` with `expect` is also asked of every prefill and decode directly; it
    should take more than one token, because the first one is prefill's own.
    """

    prompt: Text | None = None
    chat: Text | None = None
    prompt_tokens: Annotated[Literal["limit"] | int | None, BeforeValidator(_prompt_tokens)] = None
    expect: Annotated[Text | None, AfterValidator(_pattern)] = None
    max_tokens: Annotated[int, Field(gt=0, le=4096, strict=True)] = 12
    stream: bool = False

    @model_validator(mode="after")
    def _asks_one_thing(self) -> "SmokeCheck":
        given = [k for k in ("prompt", "chat", "prompt_tokens") if getattr(self, k) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"expected one of prompt, chat and prompt_tokens, found {found}")
        if self.prompt_tokens and self.expect:
            raise ValueError(
                "expected no `expect` with prompt_tokens, because nobody knows the answer to such "
                "a prompt; found one"
            )
        return self

    @property
    def name(self) -> str:
        """What it asks, for messages."""
        if self.prompt_tokens:
            size = "of the longest size" if self.prompt_tokens == "limit" else "by tokens"
            return f"a prompt {size}"
        return f"the chat {self.chat!r}" if self.chat else repr(self.prompt)


class Smoke(Model):
    """What proves the service: a completion, and checks of what answers say."""

    prompt: Text = "how are you?"
    max_tokens: Annotated[int, Field(gt=0, le=4096)] = 50
    checks: tuple[SmokeCheck, ...] = (
        # Two numbers: the first token is prefill's own, whatever decode reads.
        SmokeCheck(prompt="1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,", expect=r"^\s*13,\s*14\b"),
        SmokeCheck(chat="Say hello.", stream=True),
        SmokeCheck(prompt_tokens="limit", max_tokens=4),
    )


class VllmOptions(Model):
    """How the engine `vllm` runs on the hardware of a profile.

    `kv_buffer_device` is where KV lies while it moves: the device's own memory unless given.
    `command` and `router` are programs in the image, by name or path.
    """

    device: Literal["cpu", "cuda", "npu"]
    connector: Literal["NixlConnector", "MooncakeConnectorV1"]
    kv_buffer_device: Literal["cpu", "cuda", "npu"] | None = None
    kv_connector_extra_config: Annotated[dict[str, Any], BeforeValidator(_json)] = {}
    command: Text = "vllm"
    router: Text = "vllm-router"
    router_policy: Literal["round_robin", "random", "cache_aware", "power_of_two"] = "round_robin"
    router_metrics_port: Port = 29000


class Supports(Model):
    """What the image of a profile can do beyond a single-host decode with prefills of its size."""

    multi_host_prefill: Literal["none", "ray"] = "none"
    multi_host_decode: bool = False
    tensor_parallel: Literal["equal", "divisible"] = "equal"
    server_offset: Literal["servers", "devices"] = "servers"


KvParallelSize = Annotated[
    Literal["by-image", "prefill-pods-plus-one", "decode-tensor-parallel"] | int,
    BeforeValidator(_kv_parallel_size),
]
EngineId = Annotated[Literal["kv-rank"] | int, BeforeValidator(_engine_id)]
Rule = Annotated[str, BeforeValidator(_rule)]


class Deployment(Model):
    """A whole service: the deployment file laid on its profile."""

    name: Name
    engine: EngineName
    profile: Text
    compat: Literal["upstream"] | None = None
    allow: tuple[Rule, ...] = ()
    image: Image
    pull: Literal["always", "never"] = "always"
    model: ModelSource
    ssh: Ssh = Ssh()
    registry: Registry = Registry()
    update: UpdatePolicy | None = None
    hosts: Annotated[
        dict[Name, Annotated[HostEntry, BeforeValidator(_host_from_address)]], Field(min_length=1)
    ]
    prefill: Annotated[dict[Name, InstanceEntry], Field(min_length=1)]
    decode: Annotated[dict[Name, InstanceEntry], Field(min_length=1)]
    proxy: Annotated[dict[Name, ProxyEntry], Field(min_length=1, max_length=1)]
    settings: dict[Literal["all", "prefill", "decode"], Settings] = {}
    code: Annotated[str, BeforeValidator(_code)] = "image"
    http_proxy: Annotated[Word | None, _without_login(r"^([^/]*://)?[^/]*@")] = None
    ports: Ports = Ports()
    paths: Paths = Paths()
    container: ContainerOptions = ContainerOptions()
    gates: Gates = Gates()
    disk: Disk = Disk()
    keep: Annotated[int, Field(ge=1, le=100, strict=True)] = 3
    smoke: Smoke = Smoke()
    kv_parallel_size: KvParallelSize = "by-image"
    decode_engine_id: EngineId = "kv-rank"
    vllm: VllmOptions | None = None
    supports: Supports = Supports()
    devices_per_host: Annotated[int, Field(gt=0, le=MAX_DEVICES, strict=True)]
    profile_settings: dict[Literal["all", "prefill", "decode"], Settings]
    upstream_source: Text | None = Field(
        default=None, description="what of upstream's the profile's section `upstream` stands for"
    )

    @property
    def image_reference(self) -> str:
        """The image, from the registry that serves it here."""
        if self.registry.host is None:
            return self.image
        return f"{self.registry.host}/{split_registry(self.image)[1]}"

    @property
    def update_repository(self) -> str:
        """Where newer builds are looked for, from the registry that serves it here, without a tag.

        It is the image's unless the update policy names another one, on the same registry unless
        that one names its own.
        """
        image = re.sub(r"(@sha256:[0-9a-f]{64}|:[\w][\w.-]*)$", "", self.image)
        registry, repository = split_registry(image)
        if self.update and self.update.repository:
            own, repository = split_registry(self.update.repository)
            registry = own or registry
        return "/".join(filter(None, (self.registry.host or registry, repository)))

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
            given = level.model_dump(include=set(Settings.model_fields), exclude_unset=True)
            for key in ("mounts", "container_devices"):
                given[key] = (*merged.get(key, ()), *given.get(key, ()))
            merged = documents.merge(merged, given)
        return Settings.model_validate(merged)


def load(path: Path, *, image: str | None = None) -> Deployment:
    """The deployment that a file describes, with `image` in place of the file's own if given.

    Raises:
        InvalidInput: all that is wrong with the file, each with the path of its key.
    """
    document = documents.read(path, names_file=("profile",))
    if image is not None:
        document["image"] = image
    return parse(document, file=str(path))


def parse(document: Mapping[str, Any], *, file: str = "deployment") -> Deployment:
    """The deployment that a mapping describes; see `load`."""
    try:
        deployment = Deployment.model_validate(_on_profile(document, file))
    except ValidationError as error:
        raise InvalidInput(problems_of(error, Deployment), source=file) from error
    problems = list(_placed_on_unknown_hosts(deployment))
    if problems:
        raise InvalidInput(problems, source=file)
    return deployment


def profiles() -> list[str]:
    """Names of the profiles that come with pd-deploy."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def _on_profile(document: Mapping[str, Any], file: str) -> dict[str, Any]:
    given = [key for key in _OF_PROFILES if key in document]
    if given:
        problems = [Problem(key, "is not a key of a deployment file") for key in given]
        raise InvalidInput(problems, source=file)
    profile = dict(_profile(document.get("profile"), file))
    upstream = profile.pop("upstream", None)
    if document.get("compat") == "upstream":
        if not isinstance(upstream, Mapping):
            message = "expected a profile that says under `upstream` what upstream does"
            found = f"found {document['profile']}, which does not"
            raise InvalidInput([Problem("compat", f"{message}; {found}")], source=file)
        values = {key: value for key, value in upstream.items() if key != "source"}
        profile = documents.merge(profile, values) | {"upstream_source": upstream.get("source")}
    settings = {key: profile.pop(key) for key in ("all", "prefill", "decode") if key in profile}
    allow = [*_listed(document, "allow"), *_listed(profile, "allow")]
    merged = documents.merge(profile, document)
    if isinstance(merged.get("allow"), list):
        merged["allow"] = allow
    return {**merged, "profile_settings": settings}


def _listed(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    return value if isinstance(value, list) else []


def _profile(name: object, file: str) -> Mapping[str, Any]:
    """A profile that comes with pd-deploy, by name, or a user's own, by path."""
    if isinstance(name, str) and name in profiles():
        return _own_profile(name)
    if not isinstance(name, str) or not documents.is_path(name):
        expected = ", ".join(profiles())
        raise InvalidInput(
            [
                Problem(
                    "profile",
                    f"expected one of {expected}, or the path of a file such as ./my.yaml, "
                    f"found {_shown(name)}",
                )
            ],
            source=file,
        )
    profile = documents.read(Path(name), names_file=("profile",))
    base = profile.pop("profile", None)
    if base is None:
        return profile
    if base not in profiles():
        expected = f"expected one of {', '.join(profiles())}, found {_shown(base)}"
        raise InvalidInput([Problem("profile", expected)], source=name)
    if isinstance(profile.get("upstream"), dict):
        profile["upstream"].setdefault("source", None)  # changed values are not the base's source
    return documents.merge(_own_profile(base), profile)


@cache
def _own_profile(name: str) -> Mapping[str, Any]:
    """Read once: it comes with the package and does not change."""
    return documents.read(PROFILES / f"{name}.yaml")


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """A validation error as problems with key paths, unknown keys with their nearest known one."""
    return [
        Problem(_key(detail["loc"]), _message(detail, model))
        for detail in error.errors(include_url=False)
    ]


def split_registry(name: str) -> tuple[str, str]:
    """An image's name as the registry in front of it, empty if there is none, and the rest."""
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first, rest
    return "", name


def _placed_on_unknown_hosts(deployment: Deployment) -> Iterator[Problem]:
    known = ", ".join(deployment.hosts)
    places = [
        (f"{group}.{name}.{'host' if entry.host else 'hosts'}", host)
        for group in ("prefill", "decode", "proxy")
        for name, entry in getattr(deployment, group).items()
        for host in (entry.on if isinstance(entry, InstanceEntry) else (entry.host,))
    ]
    for key, host in places:
        if host not in deployment.hosts:
            yield Problem(key, f"expected one of {known}, found {host}")


def _key(location: tuple[int | str, ...]) -> str:
    """The path of a key, without what pydantic adds for itself."""
    return ".".join(
        str(part) for part in location if not str(part).startswith(("function-", "[key]"))
    )


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(detail["loc"], model)
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return message if "found" in message else f"{message}, found {_shown(value)}"
    if kind == "json_invalid":
        return f"not valid JSON: {detail['msg'].removeprefix('Invalid JSON: ')}"
    expected = _EXPECTED.get(kind)
    if expected is None:
        return f"{detail['msg']}, found {_shown(value)}"
    return f"expected {expected.format(**detail.get('ctx', {}))}, found {_shown(value)}"


def _unknown_key(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    known = _known_keys(location[:-1], model)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    if near:
        return f"is not a known key; did you mean {near[0]}?"
    return f"is not a known key; known are {', '.join(known)}" if known else "is not a known key"


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """Keys of the model at a place in the file."""
    model: Any = root
    for part in location:
        field = model.model_fields.get(part) if _is_model(model) else None
        model = _model_in(field.annotation) if field else model
        if model is None:
            return []
    return [key for key in model.model_fields if key not in _DERIVED]


def _model_in(annotation: Any) -> Any:
    if _is_model(annotation):
        return annotation
    found = (_model_in(arg) for arg in get_args(annotation))
    return next((model for model in found if model), None)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
