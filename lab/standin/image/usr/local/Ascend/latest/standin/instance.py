"""This server's identity, from its options, environment and ranktables, which must agree."""

import argparse
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from standin import age, ranktable
from standin.device_choice import chosen_devices, inputs
from standin.environment import Environment
from standin.ranktable import Device, Group, Server
from standin.rules import RULES, Refusal, host_path


@dataclass(frozen=True)
class Peer:
    """A prefill pod as decode sees it: its cluster id and the address of its link listener."""

    cluster_id: int
    host: str
    port: int


@dataclass(frozen=True)
class Instance:
    """One vLLM server of one pod."""

    name: str
    role: str
    server: Server  # this host's entry of the local ranktable
    devices: list[Device]  # those this server uses (of a decode instance: its share)
    cluster_id: int
    link: Peer | None  # prefill only: where it listens
    prefills: tuple[Peer, ...]
    dp_rank: int
    dp_size: int
    tensor_parallel_size: int
    kv_parallel_size: int
    pairs_by_tp: bool  # kv_parallel_size is decode's tensor parallel size, as newer images take it
    digest: str  # of the global ranktable
    zmq_port: int
    link_timeout: float  # seconds
    recomputes: bool = False  # decode computes a prompt itself whose KV it could not have
    release_seconds: float | None = None  # prefill frees KV that nobody asked for after so long

    @property
    def is_prefill(self) -> bool:
        """Tell whether it produces KV."""
        return self.role == "prefill"

    @property
    def device_ids(self) -> list[int]:
        """List the physical ids of its devices in rank order."""
        return [device.device_id for device in self.devices]


def resolve(options: argparse.Namespace, env: Environment) -> Instance:
    """Build an instance of the contract v0, or say which rule its inputs break.

    Raises:
        Refusal: names the rule and the contract's section.
    """
    check_paths(options.model)
    visible = device_list(env["ASCEND_RT_VISIBLE_DEVICES"])
    pairs_by_tp = age.has("kv-parallel-size-is-decode-tp")
    kv = _kv_config(options.kv_transfer_config, env["ROLE"])
    groups, digest = ranktable.read_global(env["GLOBAL_RANK_TABLE_FILE_PATH"])
    prefill_pods = _pod_counts(env, groups)
    _check_prefill_sizes(groups[:prefill_pods])
    groups = _in_list_order(env, groups, prefill_pods)
    index, group = _own_group(env, groups, prefill_pods)
    server = _own_server(group, visible)
    _check_kv_rank(kv, env["ROLE"], index, prefill_pods)
    if not pairs_by_tp:
        _check_kv_parallel_size(kv, prefill_pods)
    devices, first_rank = _share(options, env, group, server)
    _check_device_choice(options, env, visible, server, devices)
    if env["ROLE"] == "decode":
        _check_tp_ratio(groups[:prefill_pods], options.tensor_parallel_size)
    prefills = tuple(_peer(pod) for pod in groups[:prefill_pods])
    return Instance(
        name=env.instance or f"{env['ROLE']}-{index}",
        role=env["ROLE"],
        server=server,
        devices=devices,
        cluster_id=group.cluster_id + first_rank,
        link=_peer(group) if env["ROLE"] == "prefill" else None,
        prefills=prefills,
        dp_rank=env.number("VLLM_DP_RANK"),
        dp_size=env.number("VLLM_DP_SIZE"),
        tensor_parallel_size=options.tensor_parallel_size,
        kv_parallel_size=kv["kv_parallel_size"],
        pairs_by_tp=pairs_by_tp,
        digest=digest,
        zmq_port=env.number("VLLM_LLMDATADIST_ZMQ_PORT"),
        link_timeout=env.number("HCCL_CONNECT_TIMEOUT"),
    )


def check_paths(model: str) -> None:
    """Refuse a model or a driver that is not there."""
    if not (Path(model) / "config.json").is_file():
        raise Refusal("model", f"{model}/config.json does not exist")
    driver = Path(host_path("/usr/local/Ascend/driver/version.info"))
    if not driver.is_file():
        raise Refusal("driver", f"{driver} does not exist")


def device_list(text: str) -> list[int]:
    """Parse the visible devices; none = all devices of the host."""
    if not text:
        return []
    items = text.split(",")
    if not all(item.isdecimal() for item in items) or len(set(items)) != len(items):
        raise Refusal("devices", repr(text))
    return [int(item) for item in items]


def _kv_config(config: Any, role: str) -> dict:
    if not isinstance(config, dict):
        raise Refusal("kv-config", f"expected an object, found {config!r}")
    if config.get("kv_connector") not in RULES["kv_connectors"]:
        raise Refusal("kv-config", f"kv_connector {config.get('kv_connector')!r} is not known here")
    if config.get("kv_buffer_device") != "npu":
        raise Refusal("kv-config", f"kv_buffer_device {config.get('kv_buffer_device')!r}, not 'npu'")
    for key in ("kv_rank", "engine_id", "kv_parallel_size"):
        if type(config.get(key)) is not int:
            raise Refusal("kv-config", f"{key} must be a JSON number, found {config.get(key)!r}")
    expected = RULES["kv_roles"][role]
    if config.get("kv_role") != expected:
        raise Refusal("kv-role", f"ROLE={role} needs {expected}, found {config.get('kv_role')!r}")
    return config


def _pod_counts(env: Environment, groups: list[Group]) -> int:
    prefill, decode = env.number("PREFILL_POD_NUM"), env.number("DECODE_POD_NUM")
    if decode != 1:
        raise Refusal("pod-count", f"DECODE_POD_NUM={decode}, this image supports one decode pod")
    if prefill < 1 or prefill + decode != len(groups):
        raise Refusal(
            "pod-count",
            f"PREFILL_POD_NUM={prefill} + DECODE_POD_NUM={decode}, "
            f"the global ranktable has {len(groups)} groups",
        )
    return prefill


def _in_list_order(env: Environment, groups: list[Group], prefill_pods: int) -> list[Group]:
    pods = [pod.split(",") for pod in env["GLOBAL_DECODE_SERVER_IP_LIST"].split(";")]
    if len(pods) != len(groups) - prefill_pods:
        raise Refusal(
            "decode-ips",
            f"GLOBAL_DECODE_SERVER_IP_LIST has {len(pods)} groups, DECODE_POD_NUM is "
            f"{len(groups) - prefill_pods}",
        )
    local = env["LOCAL_DECODE_SERVER_IP_LIST"].split(",")
    if local not in pods:
        raise Refusal("decode-ips", f"LOCAL_DECODE_SERVER_IP_LIST {local} is no group of {pods}")
    decode = [
        ranktable.reorder(group, addresses)
        for group, addresses in zip(groups[prefill_pods:], pods, strict=True)
    ]
    return groups[:prefill_pods] + decode


def _own_group(env: Environment, groups: list[Group], prefill_pods: int) -> tuple[int, Group]:
    path = env["RANK_TABLE_FILE_PATH"]
    local = ranktable.read_local(path)
    if env["ROLE"] == "decode" and len(local.servers) > 1:
        local = ranktable.reorder(local, env["LOCAL_DECODE_SERVER_IP_LIST"].split(","))
    for index, group in enumerate(groups):
        if group.servers != local.servers:
            continue
        if (index < prefill_pods) != (env["ROLE"] == "prefill"):
            raise Refusal("ranktable-group", f"{path}: group {index} is not a {env['ROLE']} pod")
        return index, group
    raise Refusal("ranktable-group", f"{path} has {_summary(local)}, global has "
                  + "; ".join(_summary(group) for group in groups))


def _summary(group: Group) -> str:
    return " + ".join(f"{server.server_ip} {server.device_ids}" for server in group.servers)


def _own_server(group: Group, visible: list[int]) -> Server:
    # Without visible devices the address alone says which server of the pod this is.
    matching = [s for s in group.servers if not visible or s.device_ids == visible]
    if not matching:
        raise Refusal(
            "ranktable-instance",
            f"ASCEND_RT_VISIBLE_DEVICES is {visible}, the ranktable has {_summary(group)}",
        )
    for server in matching:
        if _is_local(server.server_ip):
            return server
    addresses = ", ".join(server.server_ip for server in matching)
    raise Refusal("ranktable-instance", f"server_ip {addresses} is not an address of this host")


def _is_local(address: str) -> bool:
    # On loopback every address is local: tests without network namespaces say which one is meant.
    if own := os.environ.get("STANDIN_ADDRESS"):
        return address == own
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _check_kv_rank(kv: dict, role: str, index: int, prefill_pods: int) -> None:
    expected = index if role == "prefill" else prefill_pods
    if kv["kv_rank"] != expected:
        raise Refusal("kv-rank", f"expected {expected}, found {kv['kv_rank']}")


def _check_kv_parallel_size(kv: dict, prefill_pods: int) -> None:
    if kv["kv_parallel_size"] != prefill_pods + 1:
        found, day = kv["kv_parallel_size"], age.built()
        raise Refusal(
            "kv-parallel-size",
            f"expected {prefill_pods + 1} in code of {day}, found {found}",
        )


def _check_prefill_sizes(prefills: list[Group]) -> None:
    # The engine computes the links of all prefill pods with the size of the first one.
    sizes = [len(group.ranks) for group in prefills]
    if len(set(sizes)) > 1:
        raise Refusal("prefill-sizes", f"devices of the prefill pods: {sizes}")


def _share(
    options: argparse.Namespace, env: Environment, group: Group, server: Server
) -> tuple[list[Device], int]:
    """Return this server's devices in the ranktable, and the world rank of the first one."""
    if env["ROLE"] == "prefill":
        return _prefill_share(options, group, server), 0
    tp = options.tensor_parallel_size
    rank, size = env.number("VLLM_DP_RANK"), env.number("VLLM_DP_SIZE")
    if tp * size != len(group.ranks):
        raise Refusal(
            "tp-devices",
            f"decode tp {tp} x {size} servers needs {tp * size} devices, "
            f"the pod has {len(group.ranks)}",
        )
    if rank >= size:
        raise Refusal("dp-world", f"VLLM_DP_RANK={rank} in a world of VLLM_DP_SIZE={size}")
    ranks = range(rank * tp, (rank + 1) * tp)
    foreign = [f"{ip} device {i}" for ip, i in (group.ranks[r] for r in ranks)
               if ip != server.server_ip]
    if foreign:
        raise Refusal("dp-world", f"VLLM_DP_RANK={rank} belongs to {', '.join(foreign)}")
    first = group.ranks.index((server.server_ip, server.device_ids[0]))
    return list(server.devices[ranks.start - first : ranks.stop - first]), rank * tp


def _prefill_share(options: argparse.Namespace, group: Group, server: Server) -> list[Device]:
    tp = options.tensor_parallel_size
    if tp != len(group.ranks):
        raise Refusal("tp-devices", f"prefill tp {tp}, the pod has {len(group.ranks)} devices")
    if len(group.servers) > 1 and options.distributed_executor_backend != "ray":
        raise Refusal("multi-node", f"{len(group.servers)} servers need the ray executor")
    return list(server.devices)


def _check_device_choice(
    options: argparse.Namespace,
    env: Environment,
    visible: list[int],
    server: Server,
    devices: list[Device],
) -> None:
    """Refuse if the workers take other devices than the ranktable gives their ranks."""
    chosen = chosen_devices(env, visible, options.tensor_parallel_size, len(devices), server)
    expected = [device.device_id for device in devices]
    if chosen != expected:
        raise Refusal(
            "device-choice",
            f"workers take devices {chosen}, the ranktable gives {expected} to their ranks "
            f"({inputs(env)})",
        )


def _check_tp_ratio(prefills: list[Group], tp: int) -> None:
    for index, group in enumerate(prefills):
        if len(group.ranks) % tp:
            raise Refusal("tp-ratio", f"prefill pod {index} has tp {len(group.ranks)}, decode {tp}")


def _peer(group: Group) -> Peer:
    # The device id, not the cluster id: it stays unique on a host that serves two deployments.
    first = group.servers[0]
    port = RULES["ports"]["link_base"] + first.device_ids[0]
    return Peer(group.cluster_id, first.server_ip, port)
