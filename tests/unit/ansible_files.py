"""Inventories, playbooks and omni_cli profiles of any shape, as their users would write them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parents[1] / "data" / "ansible"
INVENTORY = DATA / "inventory-3p1d.yml"
PLAYBOOK = DATA / "playbook-qwq.yml"
ROLES = DATA / "playbook-roles.yml"
IMAGE = "registry.example.com/omni/omniinfer:release_v0.6.0"
EARLY = "registry.example.com/omni/daily_omniinfer:20250722_26"
IN_CARDS = {8: "0,1,2,3,4,5,6,7", 16: "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"}


@dataclass(frozen=True)
class Shape:
    """A service: pods × hosts per pod, devices per host, and how the playbook starts it."""

    prefills: int = 2
    prefill_hosts: int = 1
    decode_hosts: int = 1
    devices: int = 8
    decode_tp: int = 8
    launcher: str = "pd_run.sh"
    image: str = IMAGE
    kv_parallel_size: str = "$((PREFILL_POD_NUM + 1))"
    max_len: int = 32768
    batched: int = 32768
    extra_prefill: str = "--enforce-eager --disable-log-requests --max-num-seqs 16"
    extra_decode: str = "--disable-log-requests --max-num-seqs 32"
    additional: str = '{"graph_model_compile_config": {"level": 1}}'
    exports: dict[str, str] = field(default_factory=dict)
    port_bases: tuple[int, int, int] = (8000, 9000, 5568)
    decode_offset: int = 100
    rank_step: int = 1

    def addresses(self) -> tuple[list[list[str]], list[str]]:
        """The hosts' addresses: of each prefill, and of decode. No host has two instances."""
        prefills = [
            [f"10.1.{pod}.{host + 1}" for host in range(self.prefill_hosts)]
            for pod in range(self.prefills)
        ]
        return prefills, [f"10.2.0.{host + 1}" for host in range(self.decode_hosts)]


def inventory(shape: Shape, **changes: Any) -> dict[str, Any]:
    """The inventory of a shape; `changes` are further variables of all hosts."""
    prefills, decodes = shape.addresses()
    step = f"kv_rank * {shape.rank_step} + node_rank" if shape.rank_step > 1 else "kv_rank"
    bases = dict(zip(("node_port", "api_port", "zmq_port"), _BASES, strict=True))

    def ports(offset: str, rank: str) -> dict[str, str]:
        return {
            key: f"{{{{ {base} + port_offset.{offset} + {rank} }}}}" for key, base in bases.items()
        }

    of_prefill = {
        f"p{pod}" if len(hosts) == 1 else f"p{pod}-{index}": {
            "ansible_host": address,
            "host_ip": hosts[0],
            "node_rank": index,
            "kv_rank": pod,
            "ascend_rt_visible_devices": IN_CARDS[shape.devices],
            **ports("P", step),
        }
        for pod, hosts in enumerate(prefills)
        for index, address in enumerate(hosts)
    }
    of_decode = {
        f"d{index}": {
            "ansible_host": address,
            "host_ip": decodes[0],
            "node_rank": index,
            "ascend_rt_visible_devices": IN_CARDS[shape.devices],
            **ports("D", "node_rank"),
        }
        for index, address in enumerate(decodes)
    }
    proxy = {"ansible_host": prefills[0][0], "node_rank": 0,
             "node_port": "{{ proxy_port + node_rank }}"}  # fmt: skip
    variables = {
        "ansible_user": "root",
        **dict(zip(_BASES, shape.port_bases, strict=True)),
        "proxy_port": 7000,
        "port_offset": {"P": 0, "D": shape.decode_offset},
        **changes,
    }
    groups = {"P": of_prefill, "D": of_decode, "C": {"c0": proxy}}
    children = {group: {"hosts": hosts} for group, hosts in groups.items()}
    return {"all": {"vars": variables, "children": children}}


_BASES = ("global_port_base", "base_api_port", "base_zmq_port")


def playbook(shape: Shape) -> list[dict[str, Any]]:
    """The playbook of a shape."""
    environment = {
        "LOG_PATH": "/data/logs",
        "MODEL_PATH": "/data/models/m",
        "MODEL_LEN_MAX_PREFILL": str(shape.max_len),
        "MODEL_LEN_MAX_DECODE": str(shape.max_len),
        "CODE_PATH": "/data/code",
        "DOCKER_IMAGE_ID": shape.image,
        "DOCKER_NAME_P": "mine_prefill",
        "DOCKER_NAME_D": "mine_decode",
        "DOCKER_NAME_C": "mine_proxy",
        "DECODE_TENSOR_PARALLEL_SIZE": str(shape.decode_tp),
        "KV_CONNECTOR": "AscendHcclConnectorV1",
    }
    variables = {
        "docker_run_cmd": "docker run -it --shm-size=256g --net=host --privileged=true \\\n"
        "  -v /data:/data -v $LOG_PATH:$LOG_PATH -v /mnt:/mnt --device=/dev/davinci_manager\n",
        "run_vllm_server_prefill_cmd": _script(shape, "prefill"),
        "run_vllm_server_decode_cmd": _script(shape, "decode"),
        "run_proxy_cmd": "bash global_proxy.sh --listen-port $PROXY_NODE_PORT --core-num 8 \\\n"
        "  --prefill-lb-sdk least_conn --decode-max-num-seqs 32\n",
    }
    return [{"hosts": "all", "environment": environment, "vars": variables}]


def _script(shape: Shape, role: str) -> str:
    is_prefill = role == "prefill"
    exports = "".join(f"export {name}={value}\n" for name, value in shape.exports.items())
    extra = shape.extra_prefill if is_prefill else shape.extra_decode
    config = "" if is_prefill else f"ADDITIONAL_CONFIG='{shape.additional}'\n"
    size = "${PREFILL_TENSOR_PARALLEL_SIZE}" if is_prefill else "${DECODE_TENSOR_PARALLEL_SIZE}"
    given = "" if is_prefill else ' --additional-config "$ADDITIONAL_CONFIG"'
    rank = "${KV_RANK}" if is_prefill else "${PREFILL_POD_NUM}"
    length = "${MODEL_LEN_MAX_PREFILL}" if is_prefill else "${MODEL_LEN_MAX_DECODE}"
    return f"""\
#!/bin/bash
. ~/.bashrc
export HCCL_CONNECT_TIMEOUT=1800
{exports}EXTRA_ARGS='--max-num-batched-tokens {shape.batched} {extra}'
{config}KV_SIZE={shape.kv_parallel_size}
if [ $(echo -n "$NODE_IP_LIST" | tr -cd ',' | wc -c) -ge 1 ]; then
  export RAY_CGRAPH_get_timeout=7200
  ray stop --force
  EXTRA_ARGS="${{EXTRA_ARGS}} --distributed-executor-backend ray"
  nodes=$(( $(echo -n "$NODE_IP_LIST" | tr -cd ',' | wc -c) + 1 ))
  PREFILL_TENSOR_PARALLEL_SIZE={len(IN_CARDS[shape.devices].split(",")) * shape.prefill_hosts}
fi
cd /workspace/omniinfer/tools/scripts
bash /workspace/omniinfer/tools/scripts/{shape.launcher} \\
  --role {role} --model-path ${{MODEL_PATH}} --master-ip ${{HOST_IP}} \\
  --master-port ${{MASTER_PORT}} --base-api-port ${{API_PORT}} --tp {size} \\
  --vllm-llmdatadist-zmq-port ${{ZMQ_PORT}} --max-model-len {length} \\
  --kv-rank {rank} --kv-parallel-size ${{KV_SIZE}} --kv-connector ${{KV_CONNECTOR}} \\
  --gpu-util 0.9 --vllm-enable-mc2 1 --hccl-buffsize {500 if is_prefill else 1000} \\
  --extra-args "${{EXTRA_ARGS}}"{given} \\
  --log-dir "${{LOG_PATH}}/{{{{ inventory_hostname }}}}" > $LOG_PATH/run.log 2>&1 &
"""


_FAST: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # where libyaml is


class _Dumper(_FAST):
    """Writes scripts as blocks, as people do."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def text_of(document: Any) -> str:
    """Write a document as YAML."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000)


def write(directory: Path, **documents: Any) -> list[Path]:
    """Write documents as `<name>.yml`; text as it is."""
    paths = []
    for name, document in documents.items():
        path = directory / f"{name}.yml"
        path.write_text(document if isinstance(document, str) else text_of(document))
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Profile:
    """A profile of omni_cli, by the numbers that tell such profiles apart: pods × hosts, devices of
    each instance, tensor parallel sizes, and what the launcher is given."""

    prefill: tuple[int, int, int]  # pods, hosts of each, devices of each host
    decode: tuple[int, int, int]
    decode_tp: int
    max_len: int = 32768
    batched: int | None = 32768
    kv_parallel_size: object = 1
    mtp: bool = True
    connector: str = "AscendHcclConnectorV1"
    image: str = IMAGE
    port_step: int = 16


def omni_cli(profile: Profile) -> dict[str, Any]:
    """The file of a profile."""
    hosts: dict[str, dict[str, Any]] = {"P": {}, "D": {}}
    for group, (pods, members, devices), offset in (
        ("P", profile.prefill, 0),
        ("D", profile.decode, 100),
    ):
        for pod in range(pods):
            names = [f"{group.lower()}{pod * members + index}" for index in range(members)]
            addresses = [f"10.{offset + 1}.{pod}.{index + 1}" for index in range(members)]
            for index, name in enumerate(names):
                hosts[group][name] = _instance(
                    profile, group, name, names[0], addresses, index, devices,
                    offset + profile.port_step * (pod * members + index), pod,
                )  # fmt: skip
    proxy = {
        "ansible_host": "10.1.0.1",
        "DOCKER_IMAGE_ID": profile.image,
        "container_name": "x_c0",
        "env": {"API_PORT": 7000, "ROLE": "proxy"},
        "args": {"prefill-lb-sdk": "pd_score_balance", "decode-lb-sdk": "least_conn"},
    }
    groups = {**hosts, "C": {"c0": proxy}}
    return {"all": {"children": {group: {"hosts": below} for group, below in groups.items()}}}


def _instance(
    profile: Profile,
    group: str,
    name: str,
    master: str,
    addresses: list[str],
    index: int,
    devices: int,
    offset: int,
    pod: int,
) -> dict[str, Any]:
    is_prefill = group == "P"
    listed = ",".join(map(str, range(devices)))
    tp = devices * len(addresses) if is_prefill else profile.decode_tp
    servers = 1 if is_prefill else max(1, devices // tp)
    base = 0 if is_prefill else 100
    environment = {
        "ROLE": "prefill" if is_prefill else "decode",
        "API_PORT": 9000 + offset,
        "MASTER_PORT": 8000 + base + profile.port_step * pod,
        "VLLM_LLMDATADIST_ZMQ_PORT": 5568 + offset,
        "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest",
        "ASCEND_HOME_PATH": "/usr/local/Ascend/latest",
        "ASCEND_RT_VISIBLE_DEVICES": listed,
        "SERVER_IP_LIST": addresses[0],
        "LOCAL_DECODE_SERVER_IP_LIST": "${SERVER_IP_LIST}",
        "PREFILL_POD_NUM": profile.prefill[0],
        "DEVICES": "$(echo \"$ASCEND_RT_VISIBLE_DEVICES\" | tr -d ',')",
        "RANK_TABLE_FILE_PATH": "$(ls ${RANKTABLE_SAVE_PATH}/local_*$DEVICES.json)",
        "MODEL_PATH": "/data/models/m",
        "MAX_LEN": profile.max_len,
        "LOG_PATH": "/data/log_path",
        "KV_RANK": pod if is_prefill else profile.prefill[0],
        "HCCL_CONNECT_TIMEOUT": 1800,
        "HCCL_BUFFSIZE": 20 if is_prefill else 1000,
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "GLOO_SOCKET_IFNAME": "enp23s0f3",
    }
    extra = {"max-num-seqs": 16, "disable-log-requests": ""}
    extra |= {} if profile.batched is None else {"max-num-batched-tokens": profile.batched}
    extra |= {"enforce-eager": ""} if is_prefill else {"compilation-config": {"level": 3}}
    arguments: dict[str, Any] = {
        "base-api-port": "$API_PORT",
        "master-ip": addresses[0],
        "master-port": "$MASTER_PORT",
        "gpu-util": "0.92" if is_prefill else 0.9,
        "tp": tp,
        "num-servers": servers,
        "num-dp": 1 if is_prefill else servers * len(addresses),
        "server-offset": 0 if is_prefill else devices * index,
        "max-model-len": "$MAX_LEN",
        "model-path": "$MODEL_PATH",
        "served-model-name": "deepseek",
        "log-dir": "$LOG_PATH",
        "extra-args": extra,
        "kv-transfer-config": {
            "kv_connector": profile.connector,
            "kv_role": "kv_producer" if is_prefill else "kv_consumer",
            "kv_rank": "$KV_RANK",
            "engine_id": "$KV_RANK",
            "kv_parallel_size": profile.kv_parallel_size,
        },
    }
    arguments |= {"enable-mtp": ""} if profile.mtp else {}
    if not is_prefill:
        arguments["additional-config"] = {"graph_model_compile_config": {"level": 1}}
    return {
        "ansible_host": addresses[index],
        "ansible_user": "root",
        "host_ip": addresses[0],
        "master_node": master,
        "DOCKER_IMAGE_ID": profile.image,
        "container_name": f"x_{name}",
        "ascend_rt_visible_devices": listed,
        "env": environment,
        "args": arguments,
    }
