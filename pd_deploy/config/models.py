"""The deployment file: what runs where, as typed, frozen models. Pure.

`pd_deploy.config.load` reads a file into them.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pd_deploy.config import yaml_files
from pd_deploy.config.fields import (
    MAX_DEVICES,
    AbsolutePath,
    Arguments,
    ContainerName,
    Environment,
    HostAddress,
    Image,
    Name,
    PodDevices,
    PodPort,
    Port,
    Seconds,
    Sha256,
    Text,
    Word,
    archive_of,
    compile_pattern,
    like,
    parse_code,
    parse_code_source,
    parse_engine_id,
    parse_group,
    parse_host,
    parse_json,
    parse_kv_parallel_size,
    parse_mount,
    parse_pattern,
    parse_prompt_tokens,
    parse_repositories,
    parse_rule,
    parse_size,
    require_with,
    shown,
    split_image,
    split_registry,
    without_login,
)

# Keys of the model that no document gives: they come from the profile's own, or are read by a run.
DERIVED = ("profile_settings", "upstream_source", "code_tree")
DOCKER_SOCKET = "/var/run/docker.sock"
EngineName = Literal["omniinfer", "sglang", "vllm"]
ProxyProgram = Literal["global", "omni"]


class Model(BaseModel):
    """Base of all models of the file: frozen, and an unknown key is an error."""

    # Inputs stay out of pydantic's own messages: they may hold what should not be in the file.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ModelSource(Model):
    """The model that is served and the longest sequence each side accepts, in tokens."""

    path: AbsolutePath
    served_name: Text
    max_len_prefill: Annotated[int, Field(gt=0, strict=True)]
    max_len_decode: Annotated[int, Field(gt=0, strict=True)]


class Ssh(Model):
    """How to reach the hosts. `credentials` names a Prefect block; without it, the user's SSH agent
    and ~/.ssh/config are used."""

    user: Text | None = None
    port: Port = 22
    credentials: Text | None = None


class HostSsh(Ssh):
    """How to reach one host; `address` is the one to log in at, by default the host's own."""

    address: Word | None = None


class Registry(Model):
    """Where the image comes from. `host` replaces the registry named in `image`.

    `insecure` (plain HTTP) and `ca` (a file on the controller) are only for listing tags; the
    hosts' Docker engines have their own settings for both.
    """

    host: Annotated[Word | None, without_login(r"^([^/]*://)?[^/]*@")] = None
    credentials: Text | None = None
    insecure: bool = False
    ca: AbsolutePath | None = None

    @model_validator(mode="after")
    def _one_way_to_trust(self) -> "Registry":
        if self.insecure and self.ca:
            raise ValueError("expected either `insecure` or `ca`, found both")
        return self


WINDOW_S = 7200  # a nightly that starts later could restart the servers in working hours


class UpdatePolicy(Model):
    """Which of a repository's tags count as newer builds of what runs, and their order.

    The families are those of `pd_deploy.registry.tags`. `branch` belongs to families branch-daily
    and branch-engine, `engine` to branch-engine and release-timed, `suffix` to version (none where
    its tags have none), `pattern` and `order` (names or numbers of its groups, the most significant
    first) to pattern. `repository` names those to search, by default the image's own; the newest
    build of all of them counts. `window` is how late a scheduled run may start, in seconds.
    """

    family: Literal[
        "daily",
        "branch-daily",
        "timestamp",
        "date",
        "release",
        "release-timed",
        "branch-engine",
        "version",
        "pattern",
    ]
    repository: Annotated[tuple[str, ...], BeforeValidator(parse_repositories)] = ()
    branch: Annotated[str | None, Field(validate_default=True)] = None
    engine: Annotated[str | None, Field(validate_default=True)] = None
    suffix: str | None = None
    pattern: Annotated[str | None, Field(validate_default=True)] = None
    order: tuple[Annotated[int | str, BeforeValidator(parse_group)], ...] = ()
    window: Seconds = WINDOW_S

    @field_validator("branch")
    @classmethod
    def _branch_of_its_family(cls, value: str | None, info: ValidationInfo) -> str | None:
        require_with(info, ("branch-daily", "branch-engine"), value, "a branch such as master")
        if value is not None and not re.fullmatch(r"\w[\w.-]{0,99}", value, re.ASCII):
            raise ValueError(f"expected a branch as tags spell it, found {shown(value)}")
        return value

    @field_validator("engine")
    @classmethod
    def _engine_of_its_family(cls, value: str | None, info: ValidationInfo) -> str | None:
        require_with(info, ("release-timed", "branch-engine"), value, "an engine such as vllm")
        if value is not None and not re.fullmatch(r"[a-z][a-z0-9]*", value):
            raise ValueError(f"expected an engine as tags spell it, found {shown(value)}")
        return value

    @field_validator("suffix")
    @classmethod
    def _suffix_of_its_family(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            require_with(info, ("version",), value, "")
            if not re.fullmatch(r"-\d{0,3}[a-z][\w.-]*", value, re.ASCII):
                raise ValueError(
                    f"expected what follows the version, such as -a3, found {shown(value)}"
                )
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_to_compare_by(cls, value: str | None, info: ValidationInfo) -> str | None:
        require_with(info, ("pattern",), value, r"a regular expression such as build-(\d+)")
        if value is not None and not compile_pattern(value).groups:
            raise ValueError(
                r"expected groups to compare tags by, as in build-(\d+), "
                f"found none in {shown(value)}"
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
        groups = compile_pattern(pattern)
        valid = [*groups.groupindex, *range(1, groups.groups + 1)]
        unknown = [group for group in value if group not in valid]
        if unknown or len(set(value)) < len(value):
            names = ", ".join(map(str, valid))
            listed = ", ".join(map(str, value))
            raise ValueError(f"expected groups of the pattern ({names}), each once, found {listed}")
        return value


class HostEntry(Model):
    """A machine. Without `interface`, the one that owns the address is used."""

    address: HostAddress
    interface: Text | None = None
    ssh: HostSsh | None = None
    docker_socket: AbsolutePath = DOCKER_SOCKET


class MountEntry(Model):
    """A path of the host made visible in the containers."""

    source: AbsolutePath
    target: AbsolutePath
    read_only: bool = False


MountEntries = tuple[Annotated[MountEntry, BeforeValidator(parse_mount)], ...]


class Settings(Model):
    """Tuning of the instances of a role, or of one instance. An instance's values replace those of
    `settings`, and these replace the profile's. Mounts and container devices of all levels add up;
    they come on top of `container`'s, and a mount replaces one with the same target."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    tensor_parallel: Annotated[int, Field(gt=0, strict=True)] | None = None
    environment: Environment = {}
    arguments: Arguments = {}
    additional_config: Annotated[dict[str, Any] | None, BeforeValidator(parse_json)] = None
    mounts: MountEntries = ()
    container_devices: tuple[AbsolutePath, ...] = ()


class PodPorts(Model):
    """First ports of one pod, where they are not those that the file's `ports` make.

    `master` is one for all of its hosts. On several hosts, the others are a mapping.
    """

    master: Port | None = None
    api: PodPort | None = None
    zmq: PodPort | None = None

    def on(self, kind: Literal["api", "zmq"], host: str, otherwise: int) -> int:
        """Return the first port of a kind on a host."""
        port: int | Mapping[str, int] | None = getattr(self, kind)
        if port is None:
            return otherwise
        return port[host] if isinstance(port, Mapping) else port


class InstanceEntry(Settings):
    """One pod: where it runs, and what differs from its role's settings.

    On several hosts (`hosts`, the master first) it is one engine with an instance on each.
    `devices` are those of every host, or differ by host in a mapping.
    """

    host: Name | None = None
    hosts: Annotated[tuple[Name, ...] | None, Field(min_length=1)] = None
    devices: PodDevices
    ports: PodPorts = PodPorts()

    @model_validator(mode="after")
    def _placed_once(self) -> "InstanceEntry":
        if (self.host is None) == (self.hosts is None):
            raise ValueError("expected either `host` or `hosts`, found " + self._given())
        twice = sorted({host for host in self.on if self.on.count(host) > 1})
        if twice:
            raise ValueError(f"expected each host once, found {', '.join(twice)} more than once")
        if isinstance(self.devices, Mapping) and set(self.devices) != set(self.on):
            raise ValueError(
                f"expected devices for its hosts ({', '.join(self.on)}), "
                f"found devices for {', '.join(self.devices) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _ports_of_its_hosts(self) -> "InstanceEntry":
        for kind in ("api", "zmq"):
            port = getattr(self.ports, kind)
            hosts = set(port) if isinstance(port, Mapping) else set(self.on[:1])
            if port is not None and hosts != set(self.on):
                raise ValueError(
                    f"expected ports.{kind} for each of its hosts ({', '.join(self.on)}), "
                    f"found {shown(port)}"
                )
        return self

    def _given(self) -> str:
        return "neither" if self.host is None else "both"

    @property
    def on(self) -> tuple[str, ...]:
        """Its hosts, the master first."""
        return self.hosts or (self.host or "",)

    def devices_on(self, host: str) -> tuple[int, ...]:
        """Return its devices on one of its hosts."""
        return self.devices[host] if isinstance(self.devices, Mapping) else self.devices


class ProxyEntry(Model):
    """The proxy that clients talk to.

    `hold` is how long, in seconds, a request may wait while a run has nothing that serves; with 0,
    connections are refused then. `drain` is how long requests under way may take when the proxy
    stops; without it, `container.stop_timeout`. Both are for runs: they change nothing that runs.
    `arguments` and `environment` are for its program: the image's script, or the router. `program`
    chooses between omni-infer's two. Of omni_proxy, `prefix_aware` sends a prompt where its
    beginning is cached, and `pass_through` opens the location that relays to any address.
    """

    host: Name
    port: Annotated[int, Field(ge=1024, le=65500, strict=True)] = 7000
    hold: Annotated[float, Field(ge=0, le=3600)] = 0
    drain: Annotated[int, Field(ge=1, le=3600, strict=True)] | None = None
    # nginx's workers, and the first one's core; limits and defaults of the script (section 5.2).
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
    # Of nginx-1.24.0.tar.gz as nginx.org has it, computed from the copy in Ubuntu's source package:
    # they are built as root.
    nginx_sha256: Sha256 = "77a2541637b92a621e3ee76776c8b7b40cf6d707e69ba53a940283e30ff2f55d"
    program: Literal["by-image"] | ProxyProgram = "by-image"
    prefix_aware: bool = False
    pass_through: bool = False
    environment: Environment = {}
    arguments: Arguments = {}


class Ports(Model):
    """First port of each kind; instances count up from there (contract section 1.2). Without
    `zmq_step` the engine says how far apart they have to be."""

    master: Port = 8000
    api: Port = 9000
    zmq: Port = 5568
    zmq_step: Annotated[int, Field(ge=1, le=256, strict=True)] | None = None
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
    cap_add: tuple[Annotated[str, like(r"[A-Z_]+", "a capability such as IPC_LOCK")], ...] = ()
    ulimits: dict[
        Annotated[str, like(r"[a-z]+", "a limit such as memlock")],
        Annotated[int, Field(ge=-1, strict=True)],
    ] = {}
    time_zone: Annotated[
        str, like(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", "a time zone such as Asia/Shanghai")
    ] = "Asia/Shanghai"
    stop_timeout: Annotated[int, Field(ge=1, le=3600)] = 60
    environment_file: AbsolutePath | None = None


class ApiKey(Model):
    """Where pd-deploy takes the key from that the service's servers, or its proxy, want of clients:
    from a block `Secret` of Prefect, or from a variable of pd-deploy's own environment."""

    credentials: Text | None = None
    environment: Annotated[
        str | None, like(r"[A-Za-z_][A-Za-z0-9_]*", "a variable's name such as QWQ_API_KEY")
    ] = None

    @model_validator(mode="after")
    def _from_one_place(self) -> "ApiKey":
        if (self.credentials is None) == (self.environment is None):
            found = "both" if self.credentials else "neither"
            raise ValueError(f"expected either credentials or environment, found {found}")
        return self


class BenchmarkLimits(Model):
    """What a service has to keep under the load of `gates.benchmark`: `ttft` and `tpot`, in
    seconds, for 95 % of the requests, and `throughput` in output tokens per second."""

    ttft: Seconds | None = None
    tpot: Seconds | None = None
    throughput: Annotated[float, Field(gt=0)] | None = None


class Benchmark(Model):
    """The load that a new generation has to carry before clients can connect.

    Lengths are in tokens. `seconds` is how long it may take, which counts as downtime. `tolerance`
    is by which share a median, or the throughput, may be worse than the last good generation's;
    `learned` from how much the kept figures vary.
    """

    # With fewer answers, the 95th percentile would be the slowest of them.
    requests: Annotated[int, Field(ge=20, le=100_000, strict=True)] = 100
    concurrency: Annotated[int, Field(ge=1, le=1000, strict=True)] = 8
    input_length: Annotated[int, Field(ge=1, strict=True)] = 1024
    output_length: Annotated[int, Field(ge=2, strict=True)] = 128  # TPOT needs two
    seconds: Seconds = 120
    tolerance: Literal["learned"] | Annotated[float, Field(gt=0, le=10)] = "learned"
    limits: BenchmarkLimits = BenchmarkLimits()


class Gates(Model):
    """How long each wait may last, in seconds.

    `lease` is how long a run waits for another one that works on the deployment. `lease_lasts` is
    how long that run may go without a sign of life before it counts as dead. `registry` is how
    long a scheduled run waits for a registry that is out of order; other runs fail at once. `away`
    is how long a rollback after a failure, or a recovery, waits for hosts that are away.
    `benchmark` is a load that a new generation has to carry; there is none by default.
    """

    connect: Seconds = 10
    lease: Seconds = 60  # longer than `lease_lasts`, so that a run outwaits one that died
    lease_lasts: Annotated[int, Field(ge=2, le=3600, strict=True)] = 30
    registry: Seconds = 600  # registries are down for minutes when they are maintained, at night
    pull: Seconds = 3600  # images have tens of GB
    free: Seconds = 120  # the driver may hold a device for a while after its server ended
    prepare_proxy: Seconds = 900  # nginx may have to be downloaded and built
    start: Seconds = 60
    ready: Seconds = 1800  # as long as servers wait for each other (HCCL_CONNECT_TIMEOUT)
    smoke: Seconds = 120
    away: Seconds = 600  # a server with accelerators takes minutes to start again
    benchmark: Benchmark | None = None


class Health(Model):
    """How often `pd-health` may restart what has failed: at most `attempts` times in `within`
    seconds, `pause` seconds after the first time and three times as long after each further one.
    With 0 attempts it only tells. A server that runs, with its port open, and gives no answer at
    `hung_after` checks in a row counts as failed; 0: never."""

    attempts: Annotated[int, Field(ge=0, le=50, strict=True)] = 4
    within: Seconds = 3600
    pause: Seconds = 60
    # Each check asks three times, for 3 s each: what is only busy answers once in 15 times.
    hung_after: Annotated[int, Field(ge=0, le=1000, strict=True)] = 5


class Disk(Model):
    """Free disk space that a host needs before anything is stopped: for an image that it doesn't
    have yet, and for logs. In bytes, or as `40g`."""

    # Images have tens of GB unpacked, and while they are pulled, their compressed layers besides.
    image: Annotated[int, BeforeValidator(parse_size)] = 40 << 30
    logs: Annotated[int, BeforeValidator(parse_size)] = 1 << 30


class SmokeCheck(Model):
    """A request through the proxy, and what its answer has to match.

    Give exactly one of `prompt` (a text), `chat` (a user's message) and `prompt_tokens` (a prompt
    of that many tokens, or `limit` for the longest that the service can serve). `expect` is a
    regular expression that the answer's text has to match somewhere; without it, only the form of
    the answer is checked. A `prompt` with `expect` also goes to every prefill and decode directly;
    its answer should take more than one token, because prefill makes the first.
    """

    prompt: Text | None = None
    chat: Text | None = None
    prompt_tokens: Annotated[
        Literal["limit"] | int | None, BeforeValidator(parse_prompt_tokens)
    ] = None
    expect: Annotated[Text | None, AfterValidator(parse_pattern)] = None
    max_tokens: Annotated[int, Field(gt=0, le=4096, strict=True)] = 12
    stream: bool = False

    @model_validator(mode="after")
    def _asks_one_thing(self) -> "SmokeCheck":
        keys = [k for k in ("prompt", "chat", "prompt_tokens") if getattr(self, k) is not None]
        if len(keys) != 1:
            listed = " and ".join(keys) or "none"
            raise ValueError(f"expected one of prompt, chat and prompt_tokens, found {listed}")
        if self.prompt_tokens and self.expect:
            raise ValueError(
                "expected no `expect` with prompt_tokens, because such a prompt is generated and "
                "has no known answer; found one"
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
        # Two numbers: prefill makes the first token, so only the second proves that KV arrived.
        SmokeCheck(prompt="1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,", expect=r"^\s*13,\s*14\b"),
        SmokeCheck(chat="Say hello.", stream=True),
        SmokeCheck(prompt_tokens="limit", max_tokens=4),
    )


class RouterOptions(Model):
    """What engines behind a router have in common: what their servers run on, and the router's
    options. `router_metrics_open` shows its metrics at the proxy's address, not on its host alone.
    """

    device: Literal["cpu", "cuda", "npu"]
    router_policy: Literal["round_robin", "random", "cache_aware", "power_of_two"] = "round_robin"
    router_metrics_port: Port = 29000
    router_metrics_open: bool = False


class VllmOptions(RouterOptions):
    """How the engine `vllm` runs on the hardware of a profile.

    `kv_buffer_device` is where KV is buffered while it moves; by default, the device's own memory.
    `command` and `router` are programs in the image, by name or path.
    """

    connector: Literal["NixlConnector", "MooncakeConnectorV1", "MooncakeHybridConnector"]
    kv_buffer_device: Literal["cpu", "cuda", "npu"] | None = None
    kv_connector_extra_config: Annotated[dict[str, Any], BeforeValidator(parse_json)] = {}
    command: Text = "vllm"
    router: Text = "vllm-router"


class SglangOptions(RouterOptions):
    """How the engine `sglang` runs on the hardware of a profile.

    `ib_device` names the adapters that KV goes over; by default, the transfer backend chooses.
    `command` and `router` are command lines in the image, such as `sglang serve`.
    """

    transfer_backend: Literal["mooncake", "mooncake_tcp", "nixl", "ascend", "mori"]
    ib_device: Text | None = None
    command: Text = "python3 -m sglang.launch_server"
    router: Text = "python3 -m sglang_router.launch_router"


class Supports(Model):
    """What the image of a profile can do beyond a single-host decode with prefills of its size.
    Without `server_offset`, the launcher counts in what the image's contract says. `native` is an
    engine that joins hosts itself."""

    multi_host_prefill: Literal["none", "ray", "native"] = "none"
    multi_host_decode: bool = False
    tensor_parallel: Literal["equal", "divisible"] = "equal"
    server_offset: Literal["servers", "devices"] | None = None


PathInTree = Annotated[
    str, like(r"(?!/)(?!.*(^|/)\.\.(/|$))[^\x00-\x1f]+", "a path in the tree, without '..'")
]


class OwnCode(Model):
    """Source code that replaces the image's. `source` is a directory where pd-deploy runs, or
    `URL@COMMIT` of a git repository. `path` is where the containers have it, and `package` what is
    imported from there to prove it; the engine knows both, unless its images differ. It is mounted
    there, or with `install: pip` copied and installed in each container. `patches` are applied to a
    copy: directory in the tree → patches, also in the tree, in their order."""

    source: Annotated[Text, BeforeValidator(parse_code_source)]
    install: Literal["mount", "pip"] = "mount"
    patches: dict[PathInTree, tuple[PathInTree, ...]] = {}
    path: AbsolutePath | None = None
    package: (
        Annotated[str, like(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "the name of a Python package")]
        | None
    ) = None


def _form_of_code(value: object) -> str:
    return "function-own" if isinstance(value, dict | OwnCode) else "function-place"


# Pydantic adds the tags to the paths of keys, from which problems take what begins so.
Code = Annotated[
    Annotated[str, BeforeValidator(parse_code), Tag("function-place")]
    | Annotated[OwnCode, Tag("function-own")],
    Discriminator(_form_of_code),
]


class CodeTree(Model):
    """The source code that a run has read, by digest: what servers see of it, and the proxy (none
    where it needs none). `commit` is what it is based on, "" if that is not known."""

    servers: Sha256
    proxy: Sha256 | None
    commit: str


KvParallelSize = Annotated[
    Literal["by-image", "prefill-pods-plus-one", "decode-tensor-parallel"] | int,
    BeforeValidator(parse_kv_parallel_size),
]
ContractName = Literal["v0-early", "v0", "v1", "roles"]
"""What an omni-infer image expects of its deployer, by the age of the image."""
EngineId = Annotated[Literal["kv-rank"] | int, BeforeValidator(parse_engine_id)]
Rule = Annotated[str, BeforeValidator(parse_rule)]


ALIKE = ("hold", "drain", "program", "prefix_aware")
"""Keys that all proxies of a service have the same values for: the servers are made for one kind of
proxy, and a client may ask any."""


def _alike(proxies: dict[str, ProxyEntry]) -> dict[str, ProxyEntry]:
    """Demand that proxies differ in no key of `ALIKE`.

    Raises:
        ValueError: names each key with the values that were found.
    """
    differing = []
    for key in ALIKE:
        values = {name: getattr(entry, key) for name, entry in proxies.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{shown(value)} for {name}" for name, value in values.items())
            differing.append(f"`{key}`: {listed}")
    if differing:
        raise ValueError(
            "expected the same values for all proxies, because a client may ask any of them; "
            f"found {'; '.join(differing)}"
        )
    return proxies


class Deployment(Model):
    """A whole service: the deployment file laid on its profile."""

    name: Name
    engine: EngineName
    profile: Text
    compat: Literal["upstream"] | None = None
    allow: tuple[Rule, ...] = ()
    image: Image
    pull: Literal["always", "never"] = "always"
    pull_at_once: Annotated[int, Field(ge=1, le=1000, strict=True)] = 8
    model: ModelSource
    ssh: Ssh = Ssh()
    registry: Registry = Registry()
    update: UpdatePolicy | None = None
    hosts: Annotated[
        dict[Name, Annotated[HostEntry, BeforeValidator(parse_host)]], Field(min_length=1)
    ]
    prefill: Annotated[dict[Name, InstanceEntry], Field(min_length=1)]
    decode: Annotated[dict[Name, InstanceEntry], Field(min_length=1)]
    proxy: Annotated[dict[Name, ProxyEntry], Field(min_length=1), AfterValidator(_alike)]
    settings: dict[Literal["all", "prefill", "decode"], Settings] = {}
    code: Code = "image"
    http_proxy: Annotated[Word | None, without_login(r"^([^/]*://)?[^/]*@")] = None
    ports: Ports = Ports()
    paths: Paths = Paths()
    container: ContainerOptions = ContainerOptions()
    gates: Gates = Gates()
    health: Health = Health()
    disk: Disk = Disk()
    keep: Annotated[int, Field(ge=1, le=100, strict=True)] = 3
    smoke: Smoke = Smoke()
    api_key: ApiKey | None = None
    contract: Literal["by-image"] | ContractName = "by-image"
    kv_parallel_size: KvParallelSize = "by-image"
    kv_connector_extra_config: Annotated[dict[str, Any], BeforeValidator(parse_json)] = {}
    decode_engine_id: EngineId = "kv-rank"
    vllm: VllmOptions | None = None
    sglang: SglangOptions | None = None
    supports: Supports = Supports()
    devices_per_host: Annotated[int, Field(gt=0, le=MAX_DEVICES, strict=True)]
    profile_settings: dict[Literal["all", "prefill", "decode"], Settings]
    upstream_source: Text | None = Field(
        default=None, description="the upstream files that the profile's section `upstream` follows"
    )
    code_tree: CodeTree | None = None

    @field_validator("update")
    @classmethod
    def _of_the_credentials_registry(
        cls, value: UpdatePolicy | None, info: ValidationInfo
    ) -> UpdatePolicy | None:
        registry: Registry = info.data.get("registry", Registry())
        if value and registry.credentials:
            named = _repositories(info.data.get("image", ""), registry, value)
            registries = {split_registry(name)[0] or "docker.io" for name in named}
            if len(registries) > 1:
                raise ValueError(
                    "expected repositories of one registry, because `registry.credentials` are for "
                    f"one; found {', '.join(sorted(registries))}"
                )
        return value

    @field_validator("pull")
    @classmethod
    def _not_never_with_a_file(cls, value: str, info: ValidationInfo) -> str:
        if value == "never" and archive_of(info.data.get("image", "")):
            raise ValueError(
                "expected no `pull: never` with an image in a file, which is sent to hosts that "
                "lack it; found it"
            )
        return value

    @property
    def router(self) -> RouterOptions | None:
        """The options of an engine behind a router, if it is one."""
        return self.vllm or self.sglang

    @property
    def image_reference(self) -> str:
        """The image, from the registry that serves it here."""
        if self.registry.host is None or archive_of(self.image):
            return self.image
        return f"{self.registry.host}/{split_registry(self.image)[1]}"

    @property
    def own_code(self) -> OwnCode | None:
        """The source code that pd-deploy brings to the hosts; None where it brings none."""
        return self.code if isinstance(self.code, OwnCode) else None

    @property
    def first_proxy(self) -> ProxyEntry:
        """The first proxy's entry: it also tells what all proxies have alike (`ALIKE`)."""
        return next(iter(self.proxy.values()))

    @property
    def drain(self) -> int:
        """How long requests may take, in seconds, that are under way when the proxy stops."""
        drain = self.first_proxy.drain
        return self.container.stop_timeout if drain is None else drain

    @property
    def window(self) -> timedelta:
        """How late a scheduled run may start; see `UpdatePolicy`."""
        return timedelta(seconds=self.update.window if self.update else WINDOW_S)

    @property
    def update_repositories(self) -> tuple[str, ...]:
        """The repositories to search for newer builds, with the registries that serve them here.

        It is the image's own unless the update policy names others, on the same registry unless
        their names include one.
        """
        return _repositories(self.image, self.registry, self.update)

    def settings_of(self, role: Literal["prefill", "decode"], entry: InstanceEntry) -> Settings:
        """Merge the settings of one instance: profile, then file, then the instance itself."""
        levels = [
            levels_of[key]
            for levels_of in (self.profile_settings, self.settings)
            for key in ("all", role)
            if key in levels_of
        ]
        merged: Mapping[str, Any] = {}
        for level in (*levels, entry):
            values = level.model_dump(include=set(Settings.model_fields), exclude_unset=True)
            for key in ("mounts", "container_devices"):
                values[key] = (*merged.get(key, ()), *values.get(key, ()))
            merged = yaml_files.merge(merged, values)
        return Settings.model_validate(merged)


def _repositories(image: str, registry: Registry, update: UpdatePolicy | None) -> tuple[str, ...]:
    of_image, repository = split_registry(split_image(image).name)
    named = (update and update.repository) or (repository,)
    return tuple(
        "/".join(filter(None, (registry.host or of or of_image, path)))
        for of, path in map(split_registry, named)
    )
