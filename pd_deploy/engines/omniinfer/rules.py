"""What omni-infer demands of a service, beyond what every engine does. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Pod, Topology
from pd_deploy.engines.base import Finding
from pd_deploy.engines.omniinfer import kv
from pd_deploy.engines.omniinfer.contracts import contract_of
from pd_deploy.engines.omniinfer.environment import HASH_SEED
from pd_deploy.engines.omniinfer.launcher import ports_of_ray_workers
from pd_deploy.errors import Problem

MAX_PREFILL_PODS = 32
MAX_GEARS = 6
DERIVED_ARGUMENTS = frozenset({
    "additional-config", "base-api-port", "data-parallel-address", "data-parallel-rpc-port",
    "data-parallel-size", "data-parallel-size-local", "distributed-executor-backend",
    "gpu-memory-utilization", "gpu-util", "kv-transfer-config", "log-dir", "master-ip",
    "master-port", "max-model-len", "max-port-attempts", "model-path", "num-dp", "num-servers",
    "port", "served-model-name", "server-offset", "tensor-parallel-size", "tp",
    "use-inventory-devices",
})  # fmt: skip
"""Arguments that follow from other keys of the file."""
DERIVED_ENVIRONMENT = frozenset({
    "API_PORT", "ASCEND_RT_VISIBLE_DEVICES", "DECODE_POD_NUM", "GLOBAL_DECODE_SERVER_IP_LIST",
    "GLOBAL_RANK_TABLE_FILE_PATH", "HOST_IP", "KV_RANK", "LOCAL_DECODE_SERVER_IP_LIST",
    "MASTER_PORT", "NNODES", "NODE_IP_LIST", "NODE_RANK", "OMNI_LLMDATADIST_ZMQ_PORT",
    "OMNI_PD_DECODE_POD_NUM", "OMNI_PD_PREFILL_POD_NUM", "OMNI_PD_ROLE", "PREFILL_POD_NUM",
    "RANK_TABLE_FILE_PATH", "ROLE", "SERVER_IP_LIST", "SERVER_OFFSET", "VLLM_HOST_IP",
    "VLLM_LLMDATADIST_ZMQ_PORT", "ZMQ_PORT",
})  # fmt: skip
"""Variables that follow from the topology; another value makes pods that can't link."""

DERIVED_PROXY_ARGUMENTS = frozenset({
    "core-num", "decode-endpoints", "decode-lb-sdk", "decode-servers-list", "dry-run",
    "keepalive-nginx", "listen-port", "log-file", "log-level", "nginx-conf-file",
    "prefill-endpoints", "prefill-lb-sdk", "prefill-servers-list", "reload", "rollback",
    "start-core-index", "stop",
})  # fmt: skip
"""Arguments of the proxy's script that follow from other keys, or that the start script gives."""
DERIVED_PROXY_ENVIRONMENT = frozenset({
    "CODE_PATH", "DECODE_LB_SDK", "HOST", "LOG_PATH", "PREFILL_LB_SDK", "PROXY_NODE_PORT",
    "RANKTABLE_SAVE_PATH", "http_proxy", "https_proxy",
})  # fmt: skip
"""Variables of the proxy that follow from other keys of the file."""


def findings(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    """Yield the rules that a deployment breaks: name and place."""
    yield from _pods(deployment, topology)
    yield from _prefill_sizes(topology)
    for pod in topology.decode:
        yield from _decode_devices(deployment, pod)
    for pod in topology.pods:
        yield from _tensor_parallel(pod)
        yield from _arguments(deployment, pod)
    yield from _ratio(deployment, topology)
    yield from kv.findings(deployment, topology)
    yield from _proxy(deployment, topology)
    yield from _ports_of_ray(deployment, topology)
    own = deployment.own_code
    if own and own.path and not own.path.endswith("/omniinfer"):
        message = f"expected a path that ends with /omniinfer, as scripts have it, found {own.path}"
        yield "code-path", Problem("code.path", message)


def _pods(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    count = len(topology.prefill)
    if count > MAX_PREFILL_PODS:
        message = f"expected at most {MAX_PREFILL_PODS} pods, found {count}"
        yield (
            "prefill-pods",
            Problem("prefill", f"{message}: the proxy would not choose the others"),
        )
    if len(topology.decode) > 1 and contract_of(deployment).has_ranktables:
        message = f"expected one pod, found {', '.join(p.name for p in topology.decode)}"
        yield (
            "one-decode-pod",
            Problem("decode", f"{message}: this engine links every prefill with a single one"),
        )


def _prefill_sizes(topology: Topology) -> Iterator[Finding]:
    """Compare prefills' sizes: the engine links decode with every prefill by the first one's."""
    first, *others = topology.prefill
    for pod in others:
        if pod.device_count != first.device_count:
            message = (
                f"expected as many devices as {first.name} has ({first.device_count}), "
                f"found {pod.device_count}: the engine takes the first prefill's number for all of "
                "them and would link the wrong ranks; give every prefill the same number"
            )
            yield "prefill-sizes", Problem(f"{pod.key}.devices", message)


def _decode_devices(deployment: Deployment, pod: Pod) -> Iterator[Finding]:
    """Check decode's devices: a worker of one of several copies takes the device of its own number
    on the host, and no variable moves it to another; only later launchers take a list of them."""
    if contract_of(deployment).renumbers_devices:
        return
    odd = [m for m in pod.members if m.devices != tuple(range(len(m.devices)))]
    if pod.has_copies and odd:
        expected = f"0-{len(odd[0].devices) - 1}" if len(odd[0].devices) > 1 else "0"
        listed = ", ".join(f"{member.device_list} on {member.host}" for member in odd)
        message = (
            f"expected {expected} in this order, found {listed}: with several copies of the model "
            f"({pod.master.data_parallel}) the engine counts decode's devices from 0 on each host "
            "by itself; put a prefill on the other devices"
        )
        yield "decode-devices", Problem(f"{pod.key}.devices", message)


def _tensor_parallel(pod: Pod) -> Iterator[Finding]:
    counts = {member.host: len(member.devices) for member in pod.members}
    tp, devices = pod.tensor_parallel, sum(counts.values())
    if pod.role == "prefill" and tp != devices:
        message = f"expected the number of its devices ({devices}), found {tp}"
        yield "tensor-parallel", Problem(f"{pod.key}.tensor_parallel", message)
    uneven = [host for host, count in counts.items() if count % tp]
    if pod.role == "decode" and uneven:
        message = f"expected a divisor of its devices on {uneven[0]} ({counts[uneven[0]]})"
        yield "tensor-parallel", Problem(f"{pod.key}.tensor_parallel", f"{message}, found {tp}")


def _arguments(deployment: Deployment, pod: Pod) -> Iterator[Finding]:
    settings, model = pod.master.settings, deployment.model
    longest = model.max_len_prefill if pod.role == "prefill" else model.max_len_decode
    batched = settings.arguments.get("max-num-batched-tokens")
    splits = contract_of(deployment).splits_prompts and not settings.arguments.get(
        "no-enable-chunked-prefill"
    )
    if batched is not None and not splits and (not isinstance(batched, int) or batched < longest):
        yield (
            "batched-tokens",
            Problem(
                f"{pod.key}.arguments.max-num-batched-tokens",
                f"expected at least the model length of {longest} tokens, found {batched!r}: "
                "a longer prompt would be accepted, never scheduled, and block all behind it",
            ),
        )
    for name, value in settings.arguments.items():
        if isinstance(value, str) and (not value or any(c.isspace() for c in value)):
            message = "expected a value without blanks (the launcher splits at them)"
            key = f"{pod.key}.arguments.{name}"
            yield "values-without-blanks", Problem(key, f"{message}, found {value!r}")
    yield from _gears(pod, settings.additional_config or {})


def _gears(pod: Pod, config: dict[str, Any]) -> Iterator[Finding]:
    key = f"{pod.key}.additional_config"
    if "decode_gear_list" in config:
        message = "expected it inside graph_model_compile_config; nothing reads it here"
        yield "decode-gear-list", Problem(f"{key}.decode_gear_list", message)
    inside = config.get("graph_model_compile_config")
    gears = inside.get("decode_gear_list") if isinstance(inside, dict) else None
    if isinstance(gears, list) and len(gears) > MAX_GEARS:
        key += ".graph_model_compile_config.decode_gear_list"
        message = f"expected at most {MAX_GEARS} sizes, found {len(gears)}"
        yield "decode-gear-list", Problem(key, message)


def _ports_of_ray(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    """Check that nothing has a port that a worker of ray could take before it starts."""
    hosts = {instance.host for instance in topology.instances if instance.uses_ray}
    workers = ports_of_ray_workers(deployment)
    on_hosts = [(i.key, i.host, i.ports) for i in topology.instances]
    on_hosts += [(f"proxy.{p.name}", p.host, p.ports) for p in topology.proxies]
    for key, host, ports in on_hosts:
        for purpose, port in ports.items():
            if host in hosts and port in workers:
                message = (
                    f"expected its {purpose} port on host {host} outside of {workers[0]} to "
                    f"{workers[-1]}, where ray's workers take theirs, found {port}"
                )
                yield "ports-distinct", Problem(key, message)


def _proxy(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    """Check that the image has the proxies' program, and that this program has what it needs."""
    contract, first = contract_of(deployment), topology.proxies[0]
    name, entry = first.name, first.entry
    program = contract.program(deployment)
    if program not in contract.proxies:
        message = f"expected {' or '.join(contract.proxies)}, which images of contract"
        yield (
            "proxy-program",
            Problem(f"proxy.{name}.program", f"{message} {contract.name} have, found {program}"),
        )
    if entry.prefix_aware and program != "omni":
        yield (
            "prefix-aware",
            Problem(
                f"proxy.{name}.prefix_aware",
                f"expected omni_proxy, found {program}_proxy, which looks at no prefixes; give "
                "`program: omni`",
            ),
        )
    for pod in topology.prefill if entry.prefix_aware else ():
        if pod.master.settings.arguments.get("no-enable-prefix-caching"):
            message = "expected no such key, because `prefix_aware` needs prefills that cache them"
            yield (
                "prefix-aware",
                Problem(
                    f"{pod.key}.arguments.no-enable-prefix-caching",
                    f"{message}; set it to false where it comes from a profile",
                ),
            )
    seeded = [pod.key for pod in topology.pods if _seed(pod.master.settings.environment)]
    seeded += [f"proxy.{p.name}" for p in topology.proxies if _seed(p.entry.environment)]
    for key in seeded if entry.prefix_aware else ():
        message = f"expected no such key: with `prefix_aware` it is {HASH_SEED} everywhere"
        yield "prefix-aware", Problem(f"{key}.environment.PYTHONHASHSEED", message)


def _seed(environment: Mapping[str, Scalar]) -> bool:
    """Tell whether a hash seed other than the one that is set is given."""
    return str(environment.get("PYTHONHASHSEED", HASH_SEED)) != HASH_SEED


def _ratio(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    equal = deployment.supports.tensor_parallel == "equal"
    for decode in topology.decode:
        for prefill in topology.prefill:
            tp, other = prefill.tensor_parallel, decode.tensor_parallel
            if (equal and tp != other) or tp % other:
                yield "tensor-parallel-ratio", _no_links(prefill, decode, equal)


def _no_links(prefill: Pod, decode: Pod, equal: bool) -> Problem:
    expected = "the tensor parallel size" if equal else "a multiple of the tensor parallel size"
    why = "the image links their ranks one to one" if equal else "their ranks could not be linked"
    return Problem(
        f"{prefill.key}.devices",
        f"expected {expected} of decode {decode.name} ({decode.tensor_parallel}), "
        f"found {prefill.tensor_parallel}: {why}",
    )
