"""vLLM, upstream's or for Ascend, behind vllm-router: containers, scripts, environment, arguments.

P and D need no ranktable and no order: a connector finds its peer from what the router carries
from P's answer to D's request, and fetches the KV from there. The hardware comes with the profile,
in the section `vllm`. Pure.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment, Settings, VllmOptions
from pd_deploy.config.topology import Instance, Pod, Proxy, Topology
from pd_deploy.engines import ascend, common, routed
from pd_deploy.engines.base import (
    CodePlace,
    Counter,
    Counters,
    Finding,
    Member,
    Service,
)
from pd_deploy.engines.common import flags, instance_of, longest_sequence, text
from pd_deploy.engines.device_report import DeviceTools
from pd_deploy.errors import Problem
from pd_deploy.hosts.container_values import ContainerSpec

decode_request = common.decode_request
tensor_parallel = common.tensor_parallel
BY_CONTRACT = False
AT_ONCE = False
HANDOVER_FIELDS = "kv_transfer_params"
TAKES_TOKEN_IDS = True
STARTED = routed.STARTED
PREPARED = routed.PREPARED
OPEN = routed.OPEN
PROVING = routed.PROVING
OPENED = routed.OPENED
OPEN_SIGNAL = routed.OPEN_SIGNAL
UNUSED_KEYS = (*routed.UNUSED_KEYS, "sglang")
DERIVED_PROXY_ENVIRONMENT = routed.DERIVED_PROXY_ENVIRONMENT
read_addresses_command = routed.read_addresses_command
parse_addresses = routed.parse_addresses
check_facts = routed.check_facts
ranktables = routed.ranktables
restarts_with = routed.restarts_with
shares_port = routed.shares_port
starts_after = routed.starts_after
device_users_command = routed.device_users_command
device_users = routed.device_users
device_health_command = routed.device_health_command
faulty_devices = routed.faulty_devices
probe_command = routed.probe_command
parse_probe = routed.parse_probe
for_image = routed.for_image
image_findings = routed.image_findings
proxy_metrics = routed.proxy_metrics
COUNTERS = Counters(
    served=Counter("vllm:request_success_total"),
    kv_tokens=Counter("vllm:prompt_tokens_by_source_total", (("source", "external_kv_transfer"),)),
    kv_bytes=Counter("vllm:nixl_bytes_transferred_sum"),
)
DERIVED_ARGUMENTS = frozenset({
    "additional-config", "data-parallel-address", "data-parallel-rpc-port", "data-parallel-size",
    "data-parallel-size-local", "data-parallel-start-rank", "gpu-memory-utilization", "headless",
    "host", "kv-transfer-config", "max-model-len", "model", "port", "served-model-name",
    "tensor-parallel-size",
})  # fmt: skip
DERIVED_ENVIRONMENT = frozenset({
    "ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "HCCL_IF_IP", "VLLM_HOST_IP",
    "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT",
})  # fmt: skip
DERIVED_PROXY_ARGUMENTS = frozenset({
    "decode", "host", "policy", "port", "prefill", "prometheus-host", "prometheus-port",
    "vllm-pd-disaggregation",
})  # fmt: skip
# Connectors that have the same protocol towards the router, and the same settings.
_MOONCAKE = frozenset({"MooncakeConnectorV1", "MooncakeHybridConnector"})
_RECOMPUTE = "recompute_scheduler_enable"
# It opens its port only once every server is healthy.
_ANSWERED = "    read -r -t 5 _ status _ <&3"
# What the file's own arguments of the proxy may replace.
_ROUTER_TUNING: dict[str, Scalar] = {
    "worker-startup-timeout-secs": 50,  # servers are ready before the router starts
    "worker-startup-check-interval": 1,
    "health-check-interval-secs": 2,
    "health-failure-threshold": 2,
    "health-success-threshold": 1,
}


@dataclass(frozen=True)
class _Platform:
    """What a kind of device calls the devices it may use, and its network interface."""

    visible: str
    separator: str
    interface: tuple[str, ...]


_PLATFORMS = {
    # A rank gets the cores of its part of the list.
    "cpu": _Platform("VLLM_CPU_OMP_THREADS_BIND", "|", ("GLOO_SOCKET_IFNAME", "UCX_NET_DEVICES")),
    "cuda": _Platform("CUDA_VISIBLE_DEVICES", ",", ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")),
    "npu": _Platform(
        "ASCEND_RT_VISIBLE_DEVICES",
        ",",
        ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
    ),
}


def findings(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    """Demand whole copies of the model per host, and sizes of which the larger is a multiple."""
    if deployment.vllm is None:
        message = f"is missing; profile {deployment.profile} is not one of engine vllm"
        yield "engine-keys", Problem("vllm", message)
    yield from routed.code_findings(deployment)
    for pod in topology.pods:
        tp = pod.tensor_parallel
        for member in pod.members:
            if len(member.devices) % tp:
                numbers = f"its devices on {member.host} ({len(member.devices)}), found {tp}"
                message = f"expected a divisor of {numbers}"
                yield "tensor-parallel", Problem(f"{pod.key}.tensor_parallel", message)
    yield from routed.ratio(topology)
    for pod in topology.pods:
        yield from _recomputing(pod)


def code_place(deployment: Deployment) -> CodePlace:
    """Return the file's place; see `routed.code_place`."""
    return routed.code_place(deployment, "vllm")


def members(
    deployment: Deployment,
    role: Literal["prefill", "decode"],
    devices: Sequence[int],
    tensor_parallel: int,
) -> Sequence[Member]:
    """Bring up a copy of the model per `tensor_parallel` devices, and one API server per pod.

    Peers ask each copy (NIXL), or each of its devices (Mooncake), on a port of its own.
    """
    options = deployment.vllm
    by_device = options is not None and options.connector in _MOONCAKE
    ranks = [max(1, count // tensor_parallel) for count in devices]
    return [
        Member(
            ranks=copies,
            servers=int(not index),
            kv_ports=devices[index] if by_device else copies,
        )
        for index, copies in enumerate(ranks)
    ]


def zmq_step(deployment: Deployment) -> int:
    """Return 1; profiles give what their connector takes."""
    return 1


def further_ports(
    deployment: Deployment,
    role: Literal["prefill", "decode"],
    devices: Sequence[int],
    api_ports: Sequence[int],
    settings: Settings,
) -> Mapping[str, int]:
    """Return none."""
    return {}


def prefill_request(prefill: Instance, body: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """Build what vllm-router sends to a prefill: the connectors of NIXL and Mooncake keep the KV of
    a request that says so."""
    transfer = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    return {**common.prefill_request(prefill, body, nonce), "kv_transfer_params": transfer}


def longest_prompt(deployment: Deployment, topology: Topology) -> int:
    """Return the tokens of the longest prompt and its answer; one over a step's budget is split."""
    return longest_sequence(deployment)


def cache_busting_fields(nonce: str) -> dict[str, Any]:
    """Return a salt of its own, which vLLM hashes into the blocks of its prefix cache."""
    return {"cache_salt": nonce}


def container(service: Service, name: str) -> ContainerSpec:
    """Specify the container of an instance or of a proxy; see `routed.container`."""
    return routed.container(service, name, has_device_files=_options(service).device == "npu")


def start_script(service: Service, name: str) -> str:
    """Write the script that is the container's main process."""
    instance = instance_of(service, name)
    if instance is None:
        proxy = service.topology.proxy(name)
        return routed.proxy_script(service, proxy, partial(_router, service, proxy), _ANSWERED)
    words = _serve(service, instance)
    return routed.server_script(service, instance, environment(service, name), words)


def device_tools(deployment: Deployment) -> DeviceTools | None:
    """Return those of Ascend's NPUs, where it runs on them."""
    return ascend if deployment.vllm and deployment.vllm.device == "npu" else None


def command(service: Service, name: str) -> list[str]:
    """Write `vllm serve …` for an instance, or `vllm-router …`."""
    if instance := instance_of(service, name):
        return _serve(service, instance)
    proxy = service.topology.proxy(name)
    return routed.proxy_command(proxy, partial(_router, service, proxy))


def environment(service: Service, name: str) -> dict[str, str]:
    """Return the variables that the start script exports."""
    instance = instance_of(service, name)
    if instance is None:
        return routed.proxy_environment(service.topology.proxy(name))
    platform = _PLATFORMS[_options(service).device]
    interface = service.facts[instance.host].interface
    values: dict[str, Scalar] = {
        "PYTHONUNBUFFERED": 1,
        "VLLM_HOST_IP": instance.address,
        platform.visible: platform.separator.join(map(str, instance.devices)),
        **dict.fromkeys(platform.interface, interface),
        **_side_channel(service, instance),
        **instance.settings.environment,
    }
    return {key: text(value) for key, value in values.items()}


def kv_transfer_config(service: Service, instance: Instance) -> dict[str, Any]:
    """Say how an instance takes part in KV transfer. A transfer that fails fails its request:
    computing the prompt again instead would hide the fault.

    The engine draws its own `engine_id` each time it starts: by a fixed one, decode would go on
    reading a prefill that was restarted alone at the addresses that it had before.
    """
    options = _options(service)
    config: dict[str, Any] = {
        "kv_connector": options.connector,
        "kv_role": "kv_producer" if instance.role == "prefill" else "kv_consumer",
        "kv_buffer_device": options.kv_buffer_device or options.device,
        "kv_load_failure_policy": "fail",
    }
    extra = dict(options.kv_connector_extra_config)
    if options.connector in _MOONCAKE:
        del config["kv_load_failure_policy"]
        # Each device of each rank listens; the connector adds the rank's first device itself.
        config["kv_port"] = str(
            instance.zmq_port - instance.server_offset * instance.tensor_parallel
        )
        extra = {**_sizes(service.topology), **extra}
    return {**config, "kv_connector_extra_config": extra} if extra else config


def _recomputing(pod: Pod) -> Iterator[Finding]:
    """Find where vllm-ascend's scheduler is told to end answers that don't fit into memory."""
    settings = pod.master.settings
    config = settings.additional_config or {}
    inside = config.get("scheduler_config")
    places = {
        "additional_config": config,
        "additional_config.scheduler_config": inside if isinstance(inside, dict) else {},
        "arguments": {k.replace("-", "_"): v for k, v in settings.arguments.items()},
    }
    for place, values in places.items():
        if values.get(_RECOMPUTE):
            message = (
                f"expected it off, found {values[_RECOMPUTE]!r}: when decode is short of memory, "
                "it would end an answer half-way, for a proxy that sends the request to prefill "
                "again; vllm-router does not, so clients would get half an answer"
            )
            yield "recompute-scheduler", Problem(f"{pod.key}.{place}.{_RECOMPUTE}", message)


def _options(service: Service) -> VllmOptions:
    options = service.deployment.vllm
    assert options is not None, "the rule engine-keys demands it"
    return options


def _side_channel(service: Service, instance: Instance) -> dict[str, Scalar]:
    """Say where NIXL's peers ask for an instance's KV. A rank adds its number in the pod."""
    if _options(service).connector != "NixlConnector":
        return {"HCCL_IF_IP": instance.address}
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": instance.address,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": instance.zmq_port - instance.server_offset,
    }


def _sizes(topology: Topology) -> dict[str, dict[str, int]]:
    """Return the parallel sizes of both sides, which Mooncake's connector has to know."""
    sides = {"prefill": topology.prefill[0].master, "decode": topology.decode[0].master}
    return {
        role: {"dp_size": master.data_parallel, "tp_size": master.tensor_parallel}
        for role, master in sides.items()
    }


def _serve(service: Service, instance: Instance) -> list[str]:
    model, settings = service.deployment.model, instance.settings
    longest = model.max_len_prefill if instance.role == "prefill" else model.max_len_decode
    return [
        _options(service).command, "serve", model.path,
        "--served-model-name", model.served_name,
        "--host", instance.address,
        "--port", str(instance.api_port),
        "--max-model-len", str(longest),
        "--tensor-parallel-size", str(instance.tensor_parallel),
        *_data_parallel(instance),
        *flags(settings.arguments),
        *(["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
          if settings.gpu_memory_utilization is not None else []),
        *(["--additional-config", json.dumps(settings.additional_config)]
          if settings.additional_config else []),
        "--kv-transfer-config", json.dumps(kv_transfer_config(service, instance)),
    ]  # fmt: skip


def _data_parallel(instance: Instance) -> list[str]:
    """Have the ranks of a pod over several hosts follow its master; others have no API server."""
    if instance.data_parallel == 1:
        return []
    words = ["--data-parallel-size", str(instance.data_parallel)]
    if instance.spans_hosts:
        words += ["--data-parallel-size-local", str(instance.ranks)]
        words += ["--data-parallel-address", instance.master_address]
        words += ["--data-parallel-rpc-port", str(instance.master_port)]
    if not instance.is_master:
        words += ["--headless", "--data-parallel-start-rank", str(instance.server_offset)]
    return words


def _router(service: Service, proxy: Proxy, host: str, port: str) -> list[str]:
    """Write a router's command. Round robin uses every prefill; its own default may send all to
    one. A dead server is left out within 4 s; until then requests to it fail, because the router
    does not retry."""
    topology, options = service.topology, _options(service)
    backends = [
        word
        for role, pods in (("--prefill", topology.prefill), ("--decode", topology.decode))
        for pod in pods
        for server in pod.servers
        for word in (role, f"http://{server}")
    ]
    return [
        options.router,
        "--host", host,
        "--port", port,
        "--prometheus-host", proxy.address if options.router_metrics_open else "127.0.0.1",
        "--prometheus-port", str(options.router_metrics_port),
        "--vllm-pd-disaggregation",
        *backends,
        "--policy", options.router_policy,
        *flags(_ROUTER_TUNING | routed.dashed(proxy.entry.arguments)),
    ]  # fmt: skip
