"""The rules that a service has to keep: their names, and what of a deployment breaks them. Pure.

A file may break a rule on purpose: `allow: [rule-name]`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pd_deploy.errors import Problem

if TYPE_CHECKING:
    from pd_deploy.deployment import Deployment
    from pd_deploy.topology import Pod, Topology

RULES = {
    "batched-tokens": "`max-num-batched-tokens` holds the longest prompt",
    "decode-gear-list": "graph sizes stand inside `graph_model_compile_config`, at most 6",
    "derived-arguments": "what follows from the topology is not given as an argument",
    "derived-environment": "what follows from the topology is not given as a variable",
    "device-ids": "device ids are those of the hardware",
    "devices-disjoint": "a device belongs to one instance",
    "equal-devices": "a pod has as many devices on each of its hosts",
    "host-addresses": "hosts have addresses of their own",
    "mount-targets": "mounts keep off the paths that pd-deploy mounts itself",
    "multi-host-decode": "decode spans hosts only where the profile supports it",
    "multi-host-prefill": "a prefill spans hosts only where the profile supports it",
    "one-decode-pod": "there is one decode pod",
    "ports-distinct": "a port of a host has one user",
    "ports-in-range": "ports fit into 65535, prefill's below decode's",
    "prefill-pods": "there are at most 32 prefill pods; the proxy chooses no others",
    "tensor-parallel": "tensor parallel size and devices agree",
    "tensor-parallel-ratio": "prefill's tensor parallel size is a multiple of decode's",
    "values-without-blanks": "arguments have no blanks; the launcher splits at them",
}
"""Name → what the rule demands."""

RESERVED_NAMES = {"ranktables"}
MAX_PREFILL_PODS = 32
MAX_GEARS = 6
DERIVED_ARGUMENTS = {
    "additional-config", "base-api-port", "data-parallel-address", "data-parallel-rpc-port",
    "data-parallel-size", "data-parallel-size-local", "distributed-executor-backend",
    "gpu-memory-utilization", "gpu-util", "kv-transfer-config", "log-dir", "master-ip",
    "master-port", "max-model-len", "max-port-attempts", "model-path", "num-dp", "num-servers",
    "port", "served-model-name", "server-offset", "tensor-parallel-size", "tp",
}  # fmt: skip
"""Arguments that follow from other keys of the file."""
DERIVED_ENVIRONMENT = {
    "API_PORT", "ASCEND_RT_VISIBLE_DEVICES", "DECODE_POD_NUM", "GLOBAL_DECODE_SERVER_IP_LIST",
    "GLOBAL_RANK_TABLE_FILE_PATH", "HOST_IP", "KV_RANK", "LOCAL_DECODE_SERVER_IP_LIST",
    "MASTER_PORT", "NNODES", "NODE_IP_LIST", "NODE_RANK", "PREFILL_POD_NUM",
    "RANK_TABLE_FILE_PATH", "ROLE", "SERVER_IP_LIST", "VLLM_LLMDATADIST_ZMQ_PORT", "ZMQ_PORT",
}  # fmt: skip
"""Variables that follow from the topology; another value makes pods that can't link."""

Finding = tuple[str, Problem]
"""The rule that is broken, and where."""


def broken(deployment: "Deployment", topology: "Topology") -> list[Problem]:
    """Every rule that a deployment breaks and does not allow itself to, and what is never allowed.

    Each problem names its rule.
    """
    problems = list(_names(topology))
    for rule, problem in _findings(deployment, topology):
        if rule not in deployment.allow:
            problems.append(Problem(problem.key, f"{problem.message} (rule {rule})"))
    return problems


def _findings(deployment: "Deployment", topology: "Topology") -> Iterator[Finding]:
    yield from _shared_addresses(deployment)
    yield from _shared_devices(topology)
    yield from _shared_ports(topology)
    yield from _pods(deployment, topology)
    yield from _device_ids(deployment, topology)
    for pod in topology.pods:
        yield from _spanning(deployment, pod)
        yield from _devices_of_pod(pod)
        yield from _arguments(deployment, pod)
        yield from _overrides(deployment, pod)
    yield from _ratio(deployment, topology)


def _names(topology: "Topology") -> Iterator[Problem]:
    for name, count in Counter(topology.names).items():
        if count > 1:
            yield Problem(name, "expected a name used once among prefill, decode and proxy")
        if name in RESERVED_NAMES:
            yield Problem(name, "expected another name; it is that of the ranktables' directory")


def _shared_addresses(deployment: "Deployment") -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for name, entry in deployment.hosts.items():
        if entry.address in seen:
            yield (
                "host-addresses",
                Problem(
                    f"hosts.{name}",
                    f"expected an address of its own, found {entry.address}, "
                    f"which host {seen[entry.address]} has",
                ),
            )
        seen.setdefault(entry.address, name)


def _shared_devices(topology: "Topology") -> Iterator[Finding]:
    holder: dict[tuple[str, int], str] = {}
    for instance in topology.instances:
        taken = {
            d: holder[instance.host, d] for d in instance.devices if (instance.host, d) in holder
        }
        for other in sorted(set(taken.values())):
            devices = ", ".join(str(d) for d, name in taken.items() if name == other)
            yield (
                "devices-disjoint",
                Problem(
                    f"{instance.key}.devices",
                    f"expected devices of its own on host {instance.host}, "
                    f"found {devices}, which {other} has",
                ),
            )
        holder |= {(instance.host, d): instance.name for d in instance.devices if d not in taken}


def _shared_ports(topology: "Topology") -> Iterator[Finding]:
    proxy = topology.proxy
    holder = {(proxy.host, proxy.port): f"the port of proxy {proxy.name}"}
    for instance in topology.instances:
        for purpose, port in instance.ports.items():
            place = (instance.host, port)
            if port > 65535:
                message = f"{purpose} port of {instance.name} would be {port}, above 65535"
                yield "ports-in-range", Problem("ports", message)
            if place in holder:
                message = f"its {purpose} port {port} on host {instance.host} is also"
                yield "ports-distinct", Problem(instance.key, f"{message} {holder[place]}")
            holder.setdefault(place, f"the {purpose} port of {instance.name}")


def _pods(deployment: "Deployment", topology: "Topology") -> Iterator[Finding]:
    count, ports = len(topology.prefill), deployment.ports
    if count > ports.decode_offset:
        message = (
            f"expected at least the number of prefill pods ({count}), "
            f"found {ports.decode_offset}: their ports would overlap decode's"
        )
        yield "ports-in-range", Problem("ports.decode_offset", message)
    if count > MAX_PREFILL_PODS:
        message = f"expected at most {MAX_PREFILL_PODS} pods, found {count}"
        yield (
            "prefill-pods",
            Problem("prefill", f"{message}: the proxy would not choose the others"),
        )
    if len(topology.decode) > 1:
        message = f"expected one pod, found {', '.join(p.name for p in topology.decode)}"
        yield (
            "one-decode-pod",
            Problem("decode", f"{message}: this engine links every prefill with a single one"),
        )


def _spanning(deployment: "Deployment", pod: "Pod") -> Iterator[Finding]:
    supports = deployment.supports
    prefill = pod.role == "prefill"
    supported = supports.multi_host_prefill != "none" if prefill else supports.multi_host_decode
    if len(pod.members) > 1 and not supported:
        starts = "no executor that spans hosts" if prefill else "a decode of one host only"
        message = f"expected one host, found {len(pod.members)}: profile {deployment.profile} "
        yield f"multi-host-{pod.role}", Problem(f"{pod.key}.hosts", f"{message}starts {starts}")


def _device_ids(deployment: "Deployment", topology: "Topology") -> Iterator[Finding]:
    limit = deployment.devices_per_host
    for instance in topology.instances:
        beyond = [d for d in instance.devices if d >= limit]
        if beyond:
            yield (
                "device-ids",
                Problem(
                    f"{instance.key}.devices",
                    f"expected ids below {limit} (profile {deployment.profile}), "
                    f"found {', '.join(map(str, beyond))}",
                ),
            )


def _devices_of_pod(pod: "Pod") -> Iterator[Finding]:
    counts = {member.host: len(member.devices) for member in pod.members}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} on {host}" for host, count in counts.items())
        message = f"expected as many devices on each host, found {found}"
        yield "equal-devices", Problem(f"{pod.key}.devices", message)
    tp, devices = pod.tensor_parallel, sum(counts.values())
    if pod.role == "prefill" and tp != devices:
        message = f"expected the number of its devices ({devices}), found {tp}"
        yield "tensor-parallel", Problem(f"{pod.key}.tensor_parallel", message)
    uneven = [host for host, count in counts.items() if count % tp]
    if pod.role == "decode" and uneven:
        message = f"expected a divisor of its devices on {uneven[0]} ({counts[uneven[0]]})"
        yield "tensor-parallel", Problem(f"{pod.key}.tensor_parallel", f"{message}, found {tp}")


def _arguments(deployment: "Deployment", pod: "Pod") -> Iterator[Finding]:
    settings, model = pod.master.settings, deployment.model
    longest = model.max_len_prefill if pod.role == "prefill" else model.max_len_decode
    batched = settings.arguments.get("max-num-batched-tokens")
    if batched is not None and (not isinstance(batched, int) or batched < longest):
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


def _gears(pod: "Pod", config: dict[str, Any]) -> Iterator[Finding]:
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


def _overrides(deployment: "Deployment", pod: "Pod") -> Iterator[Finding]:
    settings = pod.master.settings
    for name in sorted(DERIVED_ENVIRONMENT & settings.environment.keys()):
        message = "expected it not to be given: it follows from the topology"
        yield "derived-environment", Problem(f"{pod.key}.environment.{name}", message)
    for name in sorted(DERIVED_ARGUMENTS & {n.replace("_", "-") for n in settings.arguments}):
        message = "expected it not to be given: it follows from other keys of the file"
        yield "derived-arguments", Problem(f"{pod.key}.arguments.{name}", message)
    for mount in (*deployment.container.mounts, *settings.mounts):
        if _is_ours(deployment, mount.target):
            message = f"expected another target, found {mount.target}, which pd-deploy mounts"
            yield "mount-targets", Problem(f"{pod.key}.mounts", message)


def _is_ours(deployment: "Deployment", target: str) -> bool:
    paths = deployment.paths
    exact = {deployment.model.path, deployment.code, "/etc/localtime"}
    below = (f"{paths.state}/{deployment.name}/", f"{paths.logs}/{deployment.name}/")
    return target in exact or f"{target}/".startswith(below)


def _ratio(deployment: "Deployment", topology: "Topology") -> Iterator[Finding]:
    equal = deployment.supports.tensor_parallel == "equal"
    for decode in topology.decode:
        for prefill in topology.prefill:
            tp, other = prefill.tensor_parallel, decode.tensor_parallel
            if (equal and tp != other) or tp % other:
                yield "tensor-parallel-ratio", _no_links(prefill, decode, equal)


def _no_links(prefill: "Pod", decode: "Pod", equal: bool) -> Problem:
    expected = "the tensor parallel size" if equal else "a multiple of the tensor parallel size"
    why = "the image links their ranks one to one" if equal else "their ranks could not be linked"
    return Problem(
        f"{prefill.key}.devices",
        f"expected {expected} of decode {decode.name} ({decode.tensor_parallel}), "
        f"found {prefill.tensor_parallel}: {why}",
    )


def hint(problems: list[Problem]) -> str | None:
    """How to go on when a rule is broken on purpose."""
    if any("(rule " in problem.message for problem in problems):
        return "if a rule is broken on purpose, name it in the file: `allow: [RULE]`"
    return None
