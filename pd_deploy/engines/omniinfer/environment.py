"""Environment variables of containers and servers of omni-infer. Pure."""

import posixpath
import shlex
from typing import Literal

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Instance
from pd_deploy.engines.base import CodePlace, Service
from pd_deploy.engines.common import text
from pd_deploy.engines.omniinfer import ranktable
from pd_deploy.engines.omniinfer.contracts import CONTRACTS, Contract, contract_of
from pd_deploy.engines.omniinfer.corrections import corrected

TREE = "/workspace/omniinfer"
"""The source tree in images."""
_SCRIPTS = {contract.scripts for contract in CONTRACTS.values()}
SOURCES_OF_MODULES = "omni/accelerators/sched/global_proxy"
"""What global_proxy's nginx is built of; its build script is here too."""
SOURCES_OF_PROXY = tuple(
    sorted(
        {p for contract in CONTRACTS.values() for ps in contract.proxies.values() for p in ps}
        - _SCRIPTS
        | {SOURCES_OF_MODULES, *(f"{scripts}/global_proxy.sh" for scripts in _SCRIPTS)}
    )
)
"""What of a source tree only the proxy uses, in images of any age."""
HASH_SEED = "123"
"""`PYTHONHASHSEED` where prefill, decode and proxy have to hash alike: upstream's value."""
_RAY: dict[str, Scalar] = {
    "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": 1,
    "RAY_CGRAPH_get_timeout": 7200,  # s
    "RAY_USAGE_STATS_ENABLED": 0,
}


def code(deployment: Deployment) -> str:
    """Return the directory that has the source tree, `omniinfer`, in containers."""
    if isinstance(deployment.code, str) and deployment.code != "image":
        return deployment.code
    own = deployment.own_code
    return posixpath.dirname((own and own.path) or TREE)


def code_place(deployment: Deployment) -> CodePlace:
    """Say where the user's own source code is put."""
    own, contract = deployment.own_code, contract_of(deployment)
    path = (own and own.path) or TREE
    installs = own is not None and own.install == "pip"
    commands = (f"tree={shlex.quote(path)}", *contract.install) if installs else ()
    return CodePlace(path, (own and own.package) or contract.package, SOURCES_OF_PROXY, commands)


def is_prefix_aware(deployment: Deployment) -> bool:
    """Tell whether the proxy sends a prompt where its beginning is cached."""
    return deployment.first_proxy.prefix_aware


def of_container(service: Service, name: str) -> dict[str, str]:
    """Return what a container is created with (contract sections 2.1 and 9.4)."""
    topology = service.topology
    if not contract_of(service.deployment).has_ranktables:
        return {"LOG_PATH": service.layout.log_root}
    environment = {
        "CODE_PATH": code(service.deployment),
        "RANKTABLE_SAVE_PATH": service.layout.ranktables,
        "LOG_PATH": service.layout.log_root,
    }
    if topology.instance(name) is None:
        environment["PROXY_NODE_PORT"] = str(topology.proxy(name).port)
    return environment


def of_server(service: Service, instance: Instance) -> dict[str, str]:
    """Return what a server's script exports (contract sections 4.1 and 9.4), with the values that
    upstream's `docker exec -e` passes (2.2)."""
    topology, model = service.topology, service.deployment.model
    contract, interface = contract_of(service.deployment), service.facts[instance.host].interface
    environment: dict[str, Scalar] = {
        **contract.environment,
        "HOST": instance.name,
        "ROLE": instance.role,
        "MODEL_PATH": model.path,
        "LOG_PATH": service.layout.log_directory(instance.name),
        "HOST_IP": instance.master_address,
        "MASTER_PORT": instance.master_port,
        "API_PORT": instance.api_port,
        "ZMQ_PORT": instance.zmq_port,
        "VLLM_LLMDATADIST_ZMQ_PORT": instance.zmq_port,
        **_devices_of_workers(contract, instance),
        **(_ranktables(service, instance) if contract.has_ranktables else {}),
        "PREFILL_POD_NUM": len(topology.prefill),
        "DECODE_POD_NUM": len(topology.decode),
        "SOCKET_IFNAME": interface,
        "GLOO_SOCKET_IFNAME": interface,
        "TP_SOCKET_IFNAME": interface,
        **_corrections(service, interface),
        **_of_role(service, instance),
        **(_of_prefix_caching(instance.role) if is_prefix_aware(service.deployment) else {}),
    }
    environment |= {new: environment[old] for old, new in contract.renamed.items()}
    environment |= instance.settings.environment
    return {key: text(value) for key, value in environment.items()}


def _ranktables(service: Service, instance: Instance) -> dict[str, Scalar]:
    """Name the ranktables, and decode's addresses in their order.

    Images built since October 2025 don't read the addresses any more; which day it was is not
    known, so all that have ranktables are given them.
    """
    topology = service.topology
    decode_pods = [",".join(decode.addresses) for decode in topology.decode]
    pod = topology.pod_of(instance.name)
    local = ",".join((pod if pod.role == "decode" else topology.decode[0]).addresses)
    return {
        "GLOBAL_RANK_TABLE_FILE_PATH": ranktable.merged_path(service.layout),
        "RANK_TABLE_FILE_PATH": ranktable.local_path(service.layout, instance.pod),
        "SERVER_IP_LIST": ",".join(decode_pods),
        "LOCAL_DECODE_SERVER_IP_LIST": local,
        "GLOBAL_DECODE_SERVER_IP_LIST": ";".join(decode_pods),
    }


def _devices_of_workers(contract: Contract, instance: Instance) -> dict[str, Scalar]:
    """Say how the engine's workers find their devices.

    A worker takes number `local rank + local DP rank * tensor parallel size - SERVER_OFFSET`; the
    launcher counts the local DP rank over all members of a pod, so the offset takes away the
    devices of those before. The engine looks up a list of visible devices by the local DP rank,
    which is wrong for several copies: they get none, and the rule `decode-devices` keeps theirs at
    0, 1, … on each host. A launcher that renumbers devices is told to take the list as it is.
    """
    if instance.role == "decode" and instance.has_copies and not contract.renumbers_devices:
        return {"SERVER_OFFSET": instance.server_offset * instance.tensor_parallel}
    return {"ASCEND_RT_VISIBLE_DEVICES": instance.device_list}


def _corrections(service: Service, interface: str) -> dict[str, Scalar]:
    environment: dict[str, Scalar] = {}
    if corrected(service.deployment, "hccl-interface"):
        environment["HCCL_SOCKET_IFNAME"] = interface
    if corrected(service.deployment, "unbuffered-log"):
        environment["PYTHONUNBUFFERED"] = 1
    return environment


def _of_role(service: Service, instance: Instance) -> dict[str, Scalar]:
    model = service.deployment.model
    if instance.role == "prefill":
        return {
            "IP": instance.address,
            "MODEL_LEN_MAX_PREFILL": model.max_len_prefill,
            "PREFILL_SERVER_LIST": instance.device_list,
            "PREFILL_TENSOR_PARALLEL_SIZE": instance.tensor_parallel,
            "KV_RANK": instance.kv_rank,
            "NNODES": len(instance.pod_addresses),
            "NODE_RANK": instance.node_rank,
            "NODE_IP_LIST": ",".join(instance.pod_addresses),
            **(_of_ray(instance) if instance.uses_ray else {}),
        }
    return {
        "MODEL_LEN_MAX_DECODE": model.max_len_decode,
        "DECODE_SERVER_LIST": instance.device_list,
        "DECODE_TENSOR_PARALLEL_SIZE": instance.tensor_parallel,
        "DECODE_DATA_PARALLEL_SIZE": service.topology.pod_of(instance.name).device_list,
        "NUM_SERVERS": len(instance.devices),
    }


def _of_ray(instance: Instance) -> dict[str, Scalar]:
    """Set VLLM_HOST_IP to the address that ray is started with: the engine asks ray for the node of
    the address that it finds there."""
    return {**_RAY, "VLLM_HOST_IP": instance.address}


def _of_prefix_caching(role: Literal["prefill", "decode"]) -> dict[str, Scalar]:
    """Hash as the proxy does; have prefill say which blocks it caches."""
    events: dict[str, Scalar] = {"ENABLE_APC_EVENT": 1} if role == "prefill" else {}
    return {"PYTHONHASHSEED": HASH_SEED, **events}
