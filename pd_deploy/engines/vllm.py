"""vLLM, upstream's or for Ascend, behind vllm-router: containers, scripts, environment, arguments.

P and D need no ranktable and no order: a connector finds its peer from what the router carries
from P's answer to D's request, and fetches the KV from there. The hardware comes with the profile,
in the section `vllm`. Pure.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment, VllmOptions
from pd_deploy.config.topology import Instance, Pod, Topology
from pd_deploy.engines import common
from pd_deploy.engines.base import Counter, Counters, Finding, Member, Service
from pd_deploy.engines.common import flags
from pd_deploy.engines.load_generator import LoadGenerator, trusts_code, vllm_bench
from pd_deploy.engines.routed import RoutedEngine, code_findings, ratio
from pd_deploy.errors import Problem

# Connectors that have the same protocol towards the router, and the same settings.
_MOONCAKE = frozenset({"MooncakeConnectorV1", "MooncakeHybridConnector"})
_RECOMPUTE = "recompute_scheduler_enable"


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


class Vllm(RoutedEngine):
    """vLLM, and the router that hands KV parameters from P to D."""

    PACKAGE = "vllm"
    AT_ONCE = False
    HANDOVER_FIELDS = "kv_transfer_params"
    TAKES_TOKEN_IDS = True
    UNUSED_KEYS = (*RoutedEngine.UNUSED_KEYS, "sglang")
    # A dead server is left out after two; until then requests to it fail, as the router does not
    # retry.
    ROUTER_CHECKS_EVERY_S = 2
    COUNTERS = Counters(
        served=Counter("vllm:request_success_total"),
        kv_tokens=Counter(
            "vllm:prompt_tokens_by_source_total", (("source", "external_kv_transfer"),)
        ),
        kv_bytes=Counter("vllm:nixl_bytes_transferred_sum"),
    )
    DERIVED_ARGUMENTS = frozenset({
        "additional-config", "data-parallel-address", "data-parallel-rpc-port",
        "data-parallel-size", "data-parallel-size-local", "data-parallel-start-rank",
        "gpu-memory-utilization", "headless", "host", "kv-transfer-config", "max-model-len",
        "model", "port", "served-model-name", "tensor-parallel-size",
    })  # fmt: skip
    DERIVED_ENVIRONMENT = frozenset({
        "ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "HCCL_IF_IP", "VLLM_HOST_IP",
        "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT",
    })  # fmt: skip
    DERIVED_PROXY_ARGUMENTS = RoutedEngine.DERIVED_PROXY_ARGUMENTS | {"vllm-pd-disaggregation"}

    def findings(self, deployment: Deployment, topology: Topology) -> Iterator[Finding]:
        """Demand whole copies of the model per host, and sizes of which the larger is a multiple of
        the smaller."""
        if deployment.vllm is None:
            message = f"is missing; profile {deployment.profile} is not one of engine vllm"
            yield "engine-keys", Problem("vllm", message)
        yield from code_findings(deployment)
        for pod in topology.pods:
            tp = pod.tensor_parallel
            for member in pod.members:
                if len(member.devices) % tp:
                    numbers = f"its devices on {member.host} ({len(member.devices)}), found {tp}"
                    message = f"expected a divisor of {numbers}"
                    yield "tensor-parallel", Problem(f"{pod.key}.tensor_parallel", message)
        yield from ratio(topology)
        for pod in topology.pods:
            yield from _recomputing(pod)

    def members(
        self,
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

    def load_generator(self, deployment: Deployment, topology: Topology) -> LoadGenerator:
        """Return vLLM's, by the program that its servers are."""
        program = deployment.vllm.command if deployment.vllm else "vllm"
        return vllm_bench(program, trusts_code=trusts_code(topology))

    def prefill_request(
        self, prefill: Instance, body: Mapping[str, Any], nonce: str
    ) -> dict[str, Any]:
        """Build what vllm-router sends to a prefill: the connectors of NIXL and Mooncake keep the
        KV of a request that says so."""
        transfer = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        return {**common.prefill_request(prefill, body, nonce), "kv_transfer_params": transfer}

    def _server_environment(self, service: Service, instance: Instance) -> dict[str, Scalar]:
        platform = _PLATFORMS[_options(service).device]
        interface = service.facts[instance.host].interface
        return {
            "PYTHONUNBUFFERED": 1,
            "VLLM_HOST_IP": instance.address,
            platform.visible: platform.separator.join(map(str, instance.devices)),
            **dict.fromkeys(platform.interface, interface),
            **_side_channel(service, instance),
            **instance.settings.environment,
        }

    def _server_command(self, service: Service, instance: Instance) -> list[str]:
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

    def _router_program(self, service: Service) -> list[str]:
        return [_options(service).router]

    def _backends(self, topology: Topology) -> list[str]:
        backends = [
            word
            for role, pods in (("--prefill", topology.prefill), ("--decode", topology.decode))
            for pod in pods
            for server in pod.servers
            for word in (role, f"http://{server}")
        ]
        return ["--vllm-pd-disaggregation", *backends]

    def tensor_parallel(self, role: Literal["prefill", "decode"], devices: Sequence[int]) -> int:
        """Return all devices of a prefill, or those of one of a decode's hosts."""
        return common.tensor_parallel(role, devices)

    def decode_request(
        self, body: Mapping[str, Any], answer: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Add what prefill's answer says of its KV; return None if it says nothing."""
        return common.decode_request(body, answer)

    def _answered(self, topology: Topology) -> str:
        """Read the status alone: the router opens its port only once every server is healthy."""
        return "    read -r -t 5 _ status _ <&3"


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
