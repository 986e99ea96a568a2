"""SGLang behind its own router: containers, scripts, environment, arguments.

The router sends a prompt to a prefill and a decode at the same time, with the address of the
prefill's bootstrap server and the number of a room. There decode asks for its peer; then prefill
writes the KV into decode's memory. The hardware comes with the profile, in the section `sglang`.
Pure.
"""

import difflib
import re
import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment, SglangOptions
from pd_deploy.config.topology import Instance, Pod, Topology
from pd_deploy.engines import image_facts
from pd_deploy.engines.base import Counter, Counters, Finding, Member, Service
from pd_deploy.engines.common import flags
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.engines.load_generator import LoadGenerator, sglang_bench
from pd_deploy.engines.python import in_python
from pd_deploy.engines.routed import RoutedEngine, code_findings, dashed, ratio
from pd_deploy.engines.sglang_in_image import MARK, SERVER
from pd_deploy.errors import Problem

_SOURCE = resources.files(__package__).joinpath("sglang_in_image.py").read_text()
_ASKED = (["python3"], ["python"], ["sglang"])  # what runs the server that was asked
# Of each block of ports from an instance's zmq port on: the bootstrap server's, that of Ascend's
# store, then those by which the processes of an instance find each other. With attention's data
# parallelism these are seven, beginning with that of --dist-init-addr.
_STORE, _DIST, _BLOCK = 1, 2, 9
# Attention's data parallelism, as images have taken it at first, and as those of 2026 do.
_DP_ATTENTION = ("enable-dp-attention", "attn-dp-size", "attention-data-parallel-size")
_SAME_ON_BOTH_SIDES = ("page-size", "kv-cache-dtype")
_WORDS = re.compile(r"[\w.,:/+-]+( [\w.,:/+-]+)+")


@dataclass(frozen=True)
class _Platform:
    """What a kind of device calls the devices it may use and its network interface, and the
    transfer backends that it has."""

    visible: str | None
    interface: tuple[str, ...]
    backends: tuple[str, ...]


_PLATFORMS = {
    "cpu": _Platform(None, ("GLOO_SOCKET_IFNAME",), ("mooncake_tcp", "nixl")),
    "cuda": _Platform(
        "CUDA_VISIBLE_DEVICES",
        ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
        ("mooncake", "mooncake_tcp", "nixl", "mori"),
    ),
    "npu": _Platform(
        "ASCEND_RT_VISIBLE_DEVICES",
        ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
        ("ascend", "mooncake"),
    ),
}


class Sglang(RoutedEngine):
    """SGLang, and the router that has P and D meet in a room."""

    PACKAGE = "sglang"
    AT_ONCE = True
    HANDOVER_FIELDS = "bootstrap_host, bootstrap_port and bootstrap_room"
    TAKES_TOKEN_IDS = False
    # A decode takes no prompt without a room, so it computes none itself: all that it has served
    # came from a prefill. What was moved for that is counted where it was sent, in MiB.
    COUNTERS = Counters(
        served=Counter("sglang:num_requests_total"),
        kv_tokens=Counter("sglang:prompt_tokens_total"),
        kv_bytes=Counter("sglang:kv_transfer_total_mb_sum", scale=1 << 20),
        kv_bytes_of="prefill",
    )
    UNUSED_KEYS: tuple[str, ...] = (
        *RoutedEngine.UNUSED_KEYS, "decode.*.additional_config", "decode.*.ports.master",
        "prefill.*.additional_config", "prefill.*.ports.master", "settings.*.additional_config",
        "vllm",
    )  # fmt: skip
    ROUTER_CHECKS_EVERY_S = 5  # /health has a server generate a token
    # With the other names that its parser has for some of them.
    DERIVED_ARGUMENTS = frozenset({
        "base-gpu-id", "context-length", "device", "disaggregation-bootstrap-port",
        "disaggregation-ib-device", "disaggregation-mode", "disaggregation-transfer-backend",
        "dist-init-addr", "enable-metrics", "host", "mem-fraction-static", "model", "model-path",
        "nccl-init-addr", "nnodes", "node-rank", "port", "served-model-name",
        "tensor-parallel-size", "tp", "tp-size",
    })  # fmt: skip
    DERIVED_ENVIRONMENT = frozenset({
        "ASCEND_MF_STORE_URL", "ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES",
        "SGLANG_HOST_IP",
    })  # fmt: skip
    DERIVED_PROXY_ARGUMENTS = RoutedEngine.DERIVED_PROXY_ARGUMENTS | {"pd-disaggregation"}

    def findings(self, deployment: Deployment, topology: Topology) -> Iterator[Finding]:
        """Demand whole copies of the model, a transfer backend of the device, and KV that fits."""
        options = deployment.sglang
        if options is None:
            message = f"is missing; profile {deployment.profile} is not one of engine sglang"
            yield "engine-keys", Problem("sglang", message)
            return
        yield from code_findings(deployment)
        backends = _PLATFORMS[options.device].backends
        if options.transfer_backend not in backends:
            message = (
                f"expected one of {', '.join(backends)}, which {options.device} has; "
                f"found {options.transfer_backend}"
            )
            yield "transfer-backend", Problem("sglang.transfer_backend", message)
        for pod in topology.pods:
            yield from _sizes(pod)
        yield from ratio(topology)
        yield from _layouts(topology)

    def probe_command(self) -> list[str]:
        """Return the command that prints, in a container of an image, which options its server
        takes: names have changed between versions."""
        return in_python(_SOURCE)

    def parse_probe(self, output: str) -> ImageFacts:
        """Parse what this command printed; see `image_facts.parse`."""
        return image_facts.parse(output, MARK)

    def image_findings(
        self, deployment: Deployment, topology: Topology, facts: ImageFacts | None
    ) -> Iterator[Finding]:
        """Find arguments that the server in the image does not take, as it would end of them.

        Not where it is another server: of the file's own source code, or of a Python of its own.
        """
        options = deployment.sglang
        if facts is None or deployment.own_code or options is None:
            return
        known = facts.flags.get(SERVER, ())
        if not known or shlex.split(options.command)[:1] not in _ASKED:
            return
        server = (
            f"sglang {facts.packages['sglang']}" if "sglang" in facts.packages else "its sglang"
        )
        for pod in topology.pods:
            for name, given in dashed(pod.master.settings.arguments).items():
                # Its parser takes unambiguous beginnings of names, and `no-` of some.
                words = (f"--{name}", f"--{name.removeprefix('no-')}")
                if given is not False and not any(word.startswith(words) for word in known):
                    near = difflib.get_close_matches(words[0], known, n=1)
                    message = (
                        f"expected an option that the image's server ({server}) takes, found none "
                        "of this name" + (f"; is it {near[0].removeprefix('--')}?" if near else "")
                    )
                    yield "image-options", Problem(f"{pod.key}.arguments.{name}", message)

    def tensor_parallel(self, role: Literal["prefill", "decode"], devices: Sequence[int]) -> int:
        """Return all devices of a pod, on all of its hosts."""
        return sum(devices)

    def members(
        self,
        deployment: Deployment,
        role: Literal["prefill", "decode"],
        devices: Sequence[int],
        tensor_parallel: int,
    ) -> Sequence[Member]:
        """Bring up one API server per pod, on its master; its other hosts only say that they are
        well, on a port of their own."""
        copies = max(1, sum(devices) // tensor_parallel)
        master, other = Member(ranks=copies, servers=1, kv_ports=_BLOCK), Member(0, 0, 1)
        return [other if index else master for index in range(len(devices))]

    def zmq_step(self, deployment: Deployment) -> int:
        """Return how many ports an instance takes from its zmq port on."""
        return _BLOCK

    def load_generator(self, deployment: Deployment, topology: Topology) -> LoadGenerator:
        """Return SGLang's, by the Python that its servers run in, where the file names one."""
        words = shlex.split(deployment.sglang.command) if deployment.sglang else []
        return sglang_bench(words[0] if "-m" in words[1:2] else "python3")

    def prefill_request(
        self, prefill: Instance, body: Mapping[str, Any], nonce: str
    ) -> dict[str, Any]:
        """Build what the router sends to both: the prompt, and the room in which they meet."""
        return {
            **body,
            "bootstrap_host": prefill.address,
            "bootstrap_port": prefill.zmq_port,
            "bootstrap_room": uuid.UUID(nonce).int % (1 << 63),
        }

    def decode_request(self, body: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same."""
        return {**body}

    def _server_environment(self, service: Service, instance: Instance) -> dict[str, Scalar]:
        options = _options(service)
        platform = _PLATFORMS[options.device]
        visible = {platform.visible: instance.device_list} if platform.visible else {}
        return {
            "PYTHONUNBUFFERED": 1,
            # Without it, a prefill announces the address of its host's default route.
            "SGLANG_HOST_IP": instance.address,
            **visible,
            **dict.fromkeys(platform.interface, service.facts[instance.host].interface),
            **(_store(service.topology) if options.transfer_backend == "ascend" else {}),
            **instance.settings.environment,
        }

    def _server_command(self, service: Service, instance: Instance) -> list[str]:
        model, settings, options = service.deployment.model, instance.settings, _options(service)
        longest = model.max_len_prefill if instance.role == "prefill" else model.max_len_decode
        pod = service.topology.pod_of(instance.name)
        ib_device = ["--disaggregation-ib-device", options.ib_device] if options.ib_device else []
        return [
            *shlex.split(options.command),
            "--model-path", model.path,
            "--served-model-name", model.served_name,
            "--host", instance.address,
            "--port", str(instance.api_port if instance.is_master else instance.zmq_port),
            "--context-length", str(longest),
            "--device", options.device,
            "--tp-size", str(instance.tensor_parallel),
            *_copies(pod),
            "--disaggregation-mode", instance.role,
            "--disaggregation-transfer-backend", options.transfer_backend,
            *ib_device,
            *(["--disaggregation-bootstrap-port", str(pod.master.zmq_port)]
              if instance.role == "prefill" else []),
            *_nodes(instance, pod),
            *(["--mem-fraction-static", str(settings.gpu_memory_utilization)]
              if settings.gpu_memory_utilization is not None else []),
            "--enable-metrics",
            *_in_words(settings.arguments),
        ]  # fmt: skip

    def _router_program(self, service: Service) -> list[str]:
        return shlex.split(_options(service).router)

    def _backends(self, topology: Topology) -> list[str]:
        prefill = [
            word
            for pod in topology.prefill
            for server in pod.servers
            for word in ("--prefill", f"http://{server}", str(pod.master.zmq_port))
        ]
        decode = [
            word
            for pod in topology.decode
            for server in pod.servers
            for word in ("--decode", f"http://{server}")
        ]
        return ["--pd-disaggregation", *prefill, *decode]

    def _answered(self, topology: Topology) -> str:
        """Read how many servers the router has: it says that it is ready with the first of each
        kind, and its port is open before it has any."""
        count = sum(len(pod.servers) for pod in topology.pods)
        return f"""\
    read -r -t 5 _ status _ <&3
    timeout 5 grep -qE '"healthy_workers": ?{count}[,}}]' <&3 || status="""


def _options(service: Service) -> SglangOptions:
    options = service.deployment.sglang
    assert options is not None, "the rule engine-keys demands it"
    return options


def _sizes(pod: Pod) -> Iterator[Finding]:
    """Demand that tensor and pipeline parallelism take all devices of a pod, or, on one host, those
    of a copy of the model."""
    arguments = dashed(pod.master.settings.arguments)
    stages = _number(arguments.get("pp-size", arguments.get("pipeline-parallel-size", 1)))
    copies, rest = divmod(pod.device_count, pod.tensor_parallel * stages)
    whole = len(pod.members) > 1 or _has_dp_attention(pod) or stages > 1
    if rest or (whole and copies != 1):
        wanted = "exactly" if whole else "a divisor of"
        sizes = f"{pod.tensor_parallel}" + (f" x {stages} stages" if stages > 1 else "")
        message = f"expected {wanted} its devices ({pod.device_count}), found {sizes}"
        yield "tensor-parallel", Problem(f"{pod.key}.tensor_parallel", message)
    given = {"dp-size", "data-parallel-size", "dp"} & arguments.keys()
    if given and not arguments.get(_DP_ATTENTION[0]):
        message = (
            f"expected no such key without {_DP_ATTENTION[0]}: how many copies of the model there "
            "are follows from `tensor_parallel` and the devices"
        )
        yield "derived-arguments", Problem(f"{pod.key}.arguments.{min(given)}", message)


def _has_dp_attention(pod: Pod) -> bool:
    arguments = dashed(pod.master.settings.arguments)
    return any(arguments.get(name) for name in _DP_ATTENTION)


def _layouts(topology: Topology) -> Iterator[Finding]:
    """Find pods whose KV a decode would refuse: it compares both when it first meets a prefill."""
    first = topology.pods[0]
    expected = dashed(first.master.settings.arguments)
    for pod in topology.pods[1:]:
        arguments = dashed(pod.master.settings.arguments)
        for name in _SAME_ON_BOTH_SIDES:
            if arguments.get(name) != expected.get(name):
                message = (
                    f"expected {_given(expected.get(name))}, as {first.name} has, found "
                    f"{_given(arguments.get(name))}"
                )
                yield "kv-layout", Problem(f"{pod.key}.arguments.{name}", message)


def _given(value: Scalar | None) -> str:
    return "none" if value is None else str(value)


def _number(value: Scalar) -> int:
    return int(value) if str(value).isdecimal() and int(value) else 1


def _store(topology: Topology) -> dict[str, Scalar]:
    """Say where Ascend's transfer keeps who is there: with the first prefill, which makes it."""
    first = topology.prefill[0].master
    return {"ASCEND_MF_STORE_URL": f"tcp://{first.address}:{first.zmq_port + _STORE}"}


def _copies(pod: Pod) -> list[str]:
    """Say how many copies of the model there are, if they are not one, nor stages of one."""
    arguments = dashed(pod.master.settings.arguments)
    is_one = pod.device_count <= pod.tensor_parallel or {"pp-size", "pipeline-parallel-size"} & (
        arguments.keys()
    )
    return [] if is_one else ["--dp-size", str(pod.device_count // pod.tensor_parallel)]


def _nodes(instance: Instance, pod: Pod) -> list[str]:
    """Have the processes of a pod meet at its master. On one host they meet by themselves, unless
    attention is data parallel: then two pods of a host would take the same ports."""
    if not (instance.spans_hosts or _has_dp_attention(pod)):
        return []
    return [
        "--dist-init-addr", f"{instance.master_address}:{pod.master.zmq_port + _DIST}",
        "--nnodes", str(len(pod.members)),
        "--node-rank", str(instance.node_rank),
    ]  # fmt: skip


def _in_words(arguments: Mapping[str, Scalar]) -> list[str]:
    """Write arguments; one of several plain words has several values, as `--cuda-graph-bs 8 16`."""
    words = []
    for word in flags(dashed(arguments)):
        words += word.split() if _WORDS.fullmatch(word) else [word]
    return words
