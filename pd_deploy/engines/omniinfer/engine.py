"""omni-infer on Ascend: containers, start scripts, environment and arguments.

Values follow the QwQ-32B template; where it is faulty the corrected value is used unless the file
says `compat: upstream`. `corrections` lists every difference. Pure.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Instance, Pod, Topology
from pd_deploy.engines import common
from pd_deploy.engines.base import PROVING_ADDRESS, Counter, Counters, Member, Service
from pd_deploy.engines.common import (
    ONE_STEP_ON,
    exports,
    flags,
    instance_of,
    longest_sequence,
    mount,
    mounts,
    text,
    title,
)
from pd_deploy.engines.omniinfer import kv, npu_smi, ranktable, rules
from pd_deploy.engines.omniinfer.corrections import corrected
from pd_deploy.hosts.container_values import ContainerSpec, Mount

UNUSED_KEYS: tuple[str, ...] = ("vllm",)
DERIVED_ARGUMENTS = rules.DERIVED_ARGUMENTS
DERIVED_ENVIRONMENT = rules.DERIVED_ENVIRONMENT
DERIVED_PROXY_ARGUMENTS = rules.DERIVED_PROXY_ARGUMENTS
DERIVED_PROXY_ENVIRONMENT = rules.DERIVED_PROXY_ENVIRONMENT
findings = rules.findings
read_addresses_command = ranktable.read_addresses_command
parse_addresses = ranktable.parse_addresses
prefill_request = common.prefill_request
decode_request = common.decode_request
check_addresses = ranktable.check_addresses
STARTED = "pd-deploy: starting"
PREPARED = "pd-deploy: proxy prepared"
OPEN = "pd-deploy: proxy open"
PROVING = f"{OPEN} to the smoke test"
OPENED = f"{OPEN} to clients"
OPEN_SIGNAL = "SIGUSR1"
# Images of its time count no sources of prompt tokens; those that follow a newer vLLM do.
COUNTERS = Counters(
    served=Counter("vllm:request_success_total"),
    kv_tokens=Counter("vllm:prompt_tokens_by_source_total", (("source", "external_kv_transfer"),)),
    kv_bytes=Counter("standin:kv_transfer_bytes_total"),
)

_LAUNCHER_SWITCHES = ("no-enable-prefix-caching", "no-enable-chunked-prefill", "enable-mtp")
_LAUNCHER_OPTIONS = ("block-size", "num-speculative-tokens")
_RAY_JOIN_TIMEOUT_S = 300  # hosts start at the same time, but may be busy with their images
_NGINX = "nginx-1.24.0"
_RAY_ENVIRONMENT: dict[str, Scalar] = {
    "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": 1,
    "RAY_CGRAPH_get_timeout": 7200,  # s
    "RAY_USAGE_STATS_ENABLED": 0,
}

# Starts the launcher so that every bind() may take a port with connections in TIME_WAIT. The
# launcher looks whether its port is free by a plain bind(), which fails for 60 s after any
# connection that the server closed first: a probe that asks for `Connection: close`, an idle
# keep-alive. The server itself binds with SO_REUSEADDR and would start. A port that somebody
# listens on is refused all the same. The other ways: to wait 60 s before each start, or to end
# those sockets by `ss -K`, which kernels of today's hosts (5.10) don't do for TIME_WAIT.
_REUSING_PORTS = """\
import os, runpy, socket, sys

def bind(self, address, plain=socket.socket.bind):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    plain(self, address)

socket.socket.bind = bind
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def members(
    deployment: Deployment,
    role: Literal["prefill", "decode"],
    devices: Sequence[int],
    tensor_parallel: int,
) -> Sequence[Member]:
    """Give a prefill one API server, on its master, and a decode one per copy of the model."""
    if role == "prefill":
        return [
            Member(int(not index), int(not index), int(not index)) for index in range(len(devices))
        ]
    servers = [max(1, count // tensor_parallel) for count in devices]
    return [Member(ranks=count, servers=count, kv_ports=1) for count in servers]


def longest_prompt(deployment: Deployment, topology: Topology) -> int:
    """Return the tokens of the longest prompt, answer included: one that takes more than a step's
    budget is never scheduled, unless prompts are split (contract section 4.6)."""
    budgets = [
        budget
        for pod in topology.prefill
        if str(pod.master.settings.environment.get("FORCE_ENABLE_CHUNK_PREFILL", 0)) != "1"
        and isinstance(budget := pod.master.settings.arguments.get("max-num-batched-tokens"), int)
    ]
    return min(longest_sequence(deployment), *budgets)


def cache_busting_fields(nonce: str) -> dict[str, Any]:
    """Return none: prefix caching is off in the profiles."""
    return {}


def container(service: Service, name: str) -> ContainerSpec:
    """Specify the container of an instance or of the proxy (contract section 2.1).

    The server is its main process: exit code, logs and stop mean what they say.
    """
    options = service.deployment.container
    instance = instance_of(service, name)
    role = instance.role if instance else "proxy"
    prefix = getattr(options.names, role)
    return ContainerSpec(
        name=f"{prefix}_{name}_{service.layout.generation}",
        image=service.pinned_image,
        entrypoint=("bash",),
        command=(service.layout.start_script(name),),
        environment=_container_environment(service, name),
        mounts=_mounts(service, name),
        devices=_devices(service, instance),
        privileged=options.privileged,
        shm_size=options.shm_size,
        network_mode="host",
        user="root",
        working_dir="/data",
        init=True,
        stop_signal="SIGINT",
        stop_timeout=options.stop_timeout,
    )


def start_script(service: Service, name: str) -> str:
    """Write the script that is the container's main process."""
    instance = instance_of(service, name)
    return _server_script(service, instance) if instance else _proxy_script(service)


def ranktables(service: Service) -> Mapping[str, Mapping[str, str]]:
    """Render the merged document, for every host, and those of the pods on it: host → path →
    content."""
    addresses = {name: facts.device_addresses for name, facts in service.facts.items()}
    topology = service.topology
    merged = ranktable.render(ranktable.merged(topology, addresses))
    of_pod = {pod.name: ranktable.render(ranktable.local(pod, addresses)) for pod in topology.pods}
    return {
        host: {
            _merged_path(service): merged,
            **{_local_path(service, i): of_pod[i.pod] for i in topology.on_host(host)},
        }
        for host in service.deployment.hosts
    }


def starts_after(topology: Topology, name: str) -> tuple[str, ...]:
    """Start a prefill on one host once decode has started, and decode once the prefills that span
    hosts have: all link to each other while loading, so none can wait for another to be ready
    (contract sections 3.3 and 4.5)."""
    instance = topology.instance(name)
    if instance is None or instance.uses_ray:
        return ()
    if instance.role == "prefill":
        return topology.decode_names
    return topology.ray_names


def device_users_command() -> list[str]:
    """Run `npu-smi info`: it lists all devices and their processes (contract section 7.2)."""
    return npu_smi.COMMAND


def device_users(output: str, devices: Sequence[int], host: str) -> Mapping[int, str]:
    """Parse who uses which device from the output of `npu-smi info`."""
    return npu_smi.parse_users(output, devices, host=host)


def device_health_command(devices: Sequence[int]) -> list[str]:
    """Run `npu-smi info`, and `hccn_tool` for each device's network port."""
    return npu_smi.health_command(devices)


def faulty_devices(output: str, devices: Sequence[int]) -> Mapping[int, str]:
    """Parse which devices are out of order from what these print."""
    return npu_smi.parse_faults(output, devices)


def command(service: Service, name: str) -> list[str]:
    """Return the launcher's arguments for an instance, or those of the proxy's script."""
    instance = instance_of(service, name)
    if instance is None:
        return _proxy_command(service)
    return _launcher(service, instance) if instance.api_ports else _ray_worker(instance)


def environment(service: Service, name: str) -> dict[str, str]:
    """Return the variables that the start script exports, after the image's own ~/.bashrc."""
    instance = instance_of(service, name)
    return _server_environment(service, instance) if instance else _proxy_environment(service)


def kv_transfer_config(service: Service, instance: Instance) -> dict[str, Scalar]:
    """Say how an instance takes part in KV transfer (contract section 4.2)."""
    return {
        "kv_connector": "AscendHcclConnectorV1",
        "kv_buffer_device": "npu",
        "kv_role": "kv_producer" if instance.role == "prefill" else "kv_consumer",
        "kv_rank": instance.kv_rank,
        "engine_id": _engine_id(service, instance),
        "kv_parallel_size": kv.size(service.deployment, service.topology),
    }


def _engine_id(service: Service, instance: Instance) -> int:
    choice = service.deployment.decode_engine_id
    return instance.kv_rank if instance.role == "prefill" or choice == "kv-rank" else choice


def _code(service: Service) -> str:
    code = service.deployment.code
    return "/workspace" if code == "image" else code


def _container_environment(service: Service, name: str) -> dict[str, str]:
    proxy = service.topology.proxy
    environment = {
        "CODE_PATH": _code(service),
        "RANKTABLE_SAVE_PATH": service.layout.ranktables,
        "LOG_PATH": service.layout.log_root,
    }
    if name == proxy.name:
        environment["PROXY_NODE_PORT"] = str(proxy.port)
    return environment


def _mounts(service: Service, name: str) -> tuple[Mount, ...]:
    deployment, proxy = service.deployment, service.topology.proxy
    shared_tmp = [] if corrected(deployment, "no-shared-tmp") else [mount("/tmp")]  # noqa: S108
    after = [] if deployment.code == "image" else [mount(deployment.code)]
    if proxy.entry.nginx_tarball and name == proxy.name:
        after += [mount(proxy.entry.nginx_tarball, read_only=True)]
    return mounts(service, name, before=shared_tmp, after=after)


def _devices(service: Service, instance: Instance | None) -> tuple[str, ...]:
    options = service.deployment.container
    if instance is None:
        return options.devices
    npus = () if options.privileged else (f"/dev/davinci{d}" for d in instance.devices)
    return tuple(dict.fromkeys((*options.devices, *npus, *instance.settings.container_devices)))


def _merged_path(service: Service) -> str:
    return f"{service.layout.ranktables}/global_ranktable_merge.json"


def _local_path(service: Service, instance: Instance) -> str:
    return f"{service.layout.ranktables}/local_ranktable_{instance.pod}.json"


def _server_environment(service: Service, instance: Instance) -> dict[str, str]:
    """Follow contract section 4.1, with the values that today's `docker exec -e` passes (2.2)."""
    topology, model = service.topology, service.deployment.model
    interface = service.facts[instance.host].interface
    decode_pods = [",".join(decode.addresses) for decode in topology.decode]
    pod = topology.pod_of(instance.name)
    local = ",".join((pod if pod.role == "decode" else topology.decode[0]).addresses)
    environment = {
        "HOST": instance.name,
        "ROLE": instance.role,
        "MODEL_PATH": model.path,
        "LOG_PATH": service.layout.log_directory(instance.name),
        "HOST_IP": instance.master_address,
        "MASTER_PORT": instance.master_port,
        "API_PORT": instance.api_port,
        "ZMQ_PORT": instance.zmq_port,
        "VLLM_LLMDATADIST_ZMQ_PORT": instance.zmq_port,
        **_devices_of_workers(instance),
        "GLOBAL_RANK_TABLE_FILE_PATH": _merged_path(service),
        "RANK_TABLE_FILE_PATH": _local_path(service, instance),
        "SERVER_IP_LIST": ",".join(decode_pods),
        "LOCAL_DECODE_SERVER_IP_LIST": local,
        "GLOBAL_DECODE_SERVER_IP_LIST": ";".join(decode_pods),
        "PREFILL_POD_NUM": len(topology.prefill),
        "DECODE_POD_NUM": len(topology.decode),
        "SOCKET_IFNAME": interface,
        "GLOO_SOCKET_IFNAME": interface,
        "TP_SOCKET_IFNAME": interface,
        **_corrections_of_environment(service, interface),
        **_role_environment(service, instance),
        **instance.settings.environment,
    }
    return {key: text(value) for key, value in environment.items()}


def _devices_of_workers(instance: Instance) -> dict[str, Scalar]:
    """Say how the engine's workers find their devices.

    A worker takes number `local rank + local DP rank * tensor parallel size - SERVER_OFFSET`; the
    launcher counts the local DP rank over all members of a pod, so the offset takes away the
    devices of those before. The engine looks up a list of visible devices by the local DP rank,
    which is wrong for several copies: they get none, and the rule `decode-devices` keeps theirs at
    0, 1, … on each host.
    """
    if instance.role == "decode" and instance.has_copies:
        return {"SERVER_OFFSET": instance.server_offset * instance.tensor_parallel}
    return {"ASCEND_RT_VISIBLE_DEVICES": instance.device_list}


def _corrections_of_environment(service: Service, interface: str) -> dict[str, Scalar]:
    environment: dict[str, Scalar] = {}
    if corrected(service.deployment, "hccl-interface"):
        environment["HCCL_SOCKET_IFNAME"] = interface
    if corrected(service.deployment, "unbuffered-log"):
        environment["PYTHONUNBUFFERED"] = 1
    return environment


def _role_environment(service: Service, instance: Instance) -> dict[str, Scalar]:
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
            **(_ray_environment(instance) if instance.uses_ray else {}),
        }
    return {
        "MODEL_LEN_MAX_DECODE": model.max_len_decode,
        "DECODE_SERVER_LIST": instance.device_list,
        "DECODE_TENSOR_PARALLEL_SIZE": instance.tensor_parallel,
        "DECODE_DATA_PARALLEL_SIZE": service.topology.pod_of(instance.name).device_list,
        "NUM_SERVERS": len(instance.devices),
    }


def _ray_environment(instance: Instance) -> dict[str, Scalar]:
    """Set VLLM_HOST_IP to the address that ray is started with: the engine asks ray for the node of
    the address that it finds there."""
    return {**_RAY_ENVIRONMENT, "VLLM_HOST_IP": instance.address}


def _launcher(service: Service, instance: Instance) -> list[str]:
    """Write the launcher's command (contract section 4.2)."""
    model, settings = service.deployment.model, instance.settings
    is_decode = instance.role == "decode"
    longest = model.max_len_decode if is_decode else model.max_len_prefill
    of_launcher = (*_LAUNCHER_SWITCHES, *_LAUNCHER_OPTIONS)
    extra = {name: value for name, value in settings.arguments.items() if name not in of_launcher}
    if instance.uses_ray:
        extra["distributed-executor-backend"] = "ray"
    fixed_ports = corrected(service.deployment, "fixed-ports")
    return [
        "python", "start_api_servers.py",
        "--num-servers", str(len(instance.api_ports)),
        *(_data_parallel(service, instance) if is_decode else []),
        "--model-path", model.path,
        "--master-ip", instance.master_address,
        "--master-port", str(instance.master_port),
        "--base-api-port", str(instance.api_port),
        *(["--max-port-attempts", "1"] if fixed_ports else []),
        "--tp", str(instance.tensor_parallel),
        "--served-model-name", model.served_name,
        "--max-model-len", str(longest),
        *flags({name: settings.arguments.get(name, False) for name in of_launcher}),
        *(["--gpu-util", str(settings.gpu_memory_utilization)]
          if settings.gpu_memory_utilization is not None else []),
        "--extra-args", " ".join(flags(extra)),
        *(["--additional-config", json.dumps(settings.additional_config)]
          if settings.additional_config else []),
        "--kv-transfer-config", json.dumps(kv_transfer_config(service, instance)),
        "--log-dir", service.layout.log_directory(instance.name),
    ]  # fmt: skip


def _data_parallel(service: Service, instance: Instance) -> list[str]:
    """Place a decode member's servers among those of its pod (contract section 1.6)."""
    offset = instance.server_offset
    if service.deployment.supports.server_offset == "devices":
        offset *= instance.tensor_parallel
    return ["--server-offset", str(offset), "--num-dp", str(instance.data_parallel)]


def _proxy_command(service: Service) -> list[str]:
    """Write the command of the proxy's script (contract section 5.1)."""
    topology, proxy = service.topology, service.topology.proxy.entry
    return [
        "bash", "global_proxy.sh",
        "--listen-port", str(proxy.port),
        "--prefill-servers-list", ",".join(_servers(topology.prefill)),
        "--decode-servers-list", ",".join(_servers(topology.decode)),
        "--log-file", f"{service.layout.log_directory(topology.proxy.name)}/nginx_error.log",
        "--log-level", proxy.log_level,
        "--core-num", str(proxy.core_num),
        "--start-core-index", str(proxy.start_core_index),
        "--prefill-lb-sdk", proxy.prefill_lb_sdk,
        "--decode-lb-sdk", proxy.decode_lb_sdk,
        *flags(proxy.arguments),
    ]  # fmt: skip


def _if_known_to_the_image(service: Service) -> str:
    """Write the options that only later images' scripts have: the batch sizes of both sides, by
    which `pd_score_balance` counts free slots (16 and 32 unless given), and where requests are
    logged. An older script ends at an option that it does not know, so each is tried first.
    """
    name, arguments = service.topology.proxy.name, service.topology.proxy.entry.arguments
    options: dict[str, Scalar | None] = {
        "prefill-max-num-seqs": _most_sequences(service.topology.prefill),
        "decode-max-num-seqs": _most_sequences(service.topology.decode),
        "access-log-file": f"{service.layout.log_directory(name)}/nginx_access.log",
    }
    in_file = {argument.replace("_", "-") for argument in arguments}
    lines = ['takes() { "${proxy[@]}" "$@" --dry-run >/dev/null 2>&1 && proxy+=("$@"); }']
    lines += [
        shlex.join(["takes", f"--{option}", text(value)])
        for option, value in options.items()
        if value is not None and option not in in_file
    ]
    return "\n".join(lines)


def _most_sequences(pods: Sequence[Pod]) -> int | None:
    """Return the largest `max-num-seqs` among pods; None if none of them gives one."""
    numbers = [
        int(value)
        for pod in pods
        for name, value in pod.master.settings.arguments.items()
        if name.replace("_", "-") == "max-num-seqs" and str(value).isdecimal()
    ]
    return max(numbers, default=None)


def _servers(pods: Iterable[Pod]) -> list[str]:
    return [server for pod in pods for server in pod.servers]


def _proxy_environment(service: Service) -> dict[str, str]:
    """Say where an image without nginx finds its sources; add what the file gives."""
    in_file = service.topology.proxy.entry.environment
    return _build_environment(service) | {key: text(value) for key, value in in_file.items()}


def _build_environment(service: Service) -> dict[str, str]:
    url, proxy = service.deployment.http_proxy, service.topology.proxy
    if corrected(service.deployment, "proxy-environment"):
        return {"http_proxy": url, "https_proxy": url} if url else {}
    return {
        "http_proxy": url or "",
        "https_proxy": url or "",
        "HOST": proxy.name,
        "PREFILL_LB_SDK": proxy.entry.prefill_lb_sdk,
        "DECODE_LB_SDK": proxy.entry.decode_lb_sdk,
    }


def _server_script(service: Service, instance: Instance) -> str:
    argv = command(service, instance.name)
    if instance.api_ports:
        python, *launcher = argv
        argv = [python, "-c", _REUSING_PORTS, *launcher]
    return f"""\
#!/bin/bash
{title(service, instance.name)}
source ~/.bashrc
{exports(environment(service, instance.name))}
cd {shlex.quote(_code(service))}/omniinfer/tools/scripts || exit 1
echo {shlex.quote(f"{STARTED} {instance.role} {instance.name}")}
{_ray(instance)}exec {shlex.join(argv)}
"""


def _ray(instance: Instance) -> str:
    """Bring up the executor that spans the pod's hosts, on its master (contract section 1.5)."""
    if not (instance.uses_ray and instance.is_master):
        return ""
    nodes = len(instance.pod_addresses)
    head = [
        "ray", "start", "--head", f"--node-ip-address={instance.address}",
        f"--port={instance.ray_port}", f"--num-gpus={len(instance.devices)}",
    ]  # fmt: skip
    alive = "import ray; ray.init(address='auto'); print(sum(n['Alive'] for n in ray.nodes()))"
    return f"""\
{shlex.join(head)} || exit 1
until [ "$(python -c {shlex.quote(alive)} 2>/dev/null | tail -n 1)" = {nodes} ]; do
    if [ $SECONDS -ge {_RAY_JOIN_TIMEOUT_S} ]; then
        echo "pd-deploy: expected {nodes} ray nodes within {_RAY_JOIN_TIMEOUT_S} s" >&2
        exit 1
    fi
    sleep 0.5
done
"""


def _ray_worker(instance: Instance) -> list[str]:
    """Join the master's executor as soon as it listens, and stay as long as it lives."""
    master = f"{instance.master_address}:{instance.ray_port}"
    join = [
        "ray", "start", f"--address={master}", f"--node-ip-address={instance.address}",
        f"--num-gpus={len(instance.devices)}", "--block",
    ]  # fmt: skip
    wait = (
        f"until (: </dev/tcp/{instance.master_address}/{instance.ray_port}) 2>/dev/null; do "
        f"if [ $SECONDS -ge {_RAY_JOIN_TIMEOUT_S} ]; then "
        f'echo "pd-deploy: expected ray to listen on {master} within {_RAY_JOIN_TIMEOUT_S} s" >&2; '
        "exit 1; fi; sleep 0.5; done; "
    )
    return ["bash", "-c", f"{wait}exec {shlex.join(join)}"]


def _proxy_script(service: Service) -> str:
    """Write a script that prepares nginx, tests its configuration, and waits to be opened to the
    smoke test alone, then to clients. It ends when nginx does; stopping it drains nginx."""
    code, port = shlex.quote(_code(service)), service.topology.proxy.port
    return f"""\
#!/bin/bash
{title(service, service.topology.proxy.name)}
{exports(environment(service, service.topology.proxy.name))}
trap 'exit 0' INT TERM
export PATH="$PATH:/usr/local/nginx:/usr/sbin"
if ! command -v nginx >/dev/null; then
    echo "pd-deploy: the image has no nginx; building {_NGINX}"
    cd {code}/omniinfer/omni/accelerators/sched/global_proxy || exit 1
{_fetch_nginx(service)}
{_BUILD_NGINX}fi
unset http_proxy https_proxy
cd {code}/omniinfer/tools/scripts || exit 1
proxy=({shlex.join(command(service, service.topology.proxy.name))})
{_if_known_to_the_image(service)}
"${{proxy[@]}}" --dry-run || exit 1
conf=/usr/local/nginx/conf/nginx.conf
sed -E "s|listen +{port}[^;]*;|listen {PROVING_ADDRESS}:{port};|" $conf >$conf.proving
nginx -t -c $conf.proving || exit 1
{ONE_STEP_ON}
echo {shlex.quote(PREPARED)}
one_step_on
# The balancer's counts outlive a reload, so clients get an nginx of their own.
nginx -c $conf.proving || exit 1
proving=$(pgrep -o -x nginx) || exit 1
echo {shlex.quote(PROVING)}
one_step_on
kill -QUIT "$proving"
tail -s 0.05 --pid="$proving" -f /dev/null
"${{proxy[@]}}" || exit 1
master=$(pgrep -o -x nginx) || exit 1
trap 'stopped=1; kill -QUIT "$master"' INT TERM
echo {shlex.quote(OPENED)}
tail --pid="$master" -f /dev/null & waiter=$!
while kill -0 "$waiter" 2>/dev/null; do wait "$waiter"; done
[ -n "$stopped" ] || {{ echo "pd-deploy: nginx ended"; exit 1; }}
"""


# Build scripts differ in the version that they take unless they are told one.
_BUILD_NGINX = f"""\
    export NGINX_VERSION={_NGINX.removeprefix("nginx-")}
    tar xzf {_NGINX}.tar.gz && bash build.sh || {{ echo "pd-deploy: nginx was not built"; exit 1; }}
"""


def _fetch_nginx(service: Service) -> str:
    """Write how the sources get there: from the host or nginx.org, and no others than expected."""
    entry, tarball = service.topology.proxy.entry, f"{_NGINX}.tar.gz"
    fetch = f"curl -fsS -o {tarball} https://nginx.org/download/{tarball}"
    if entry.nginx_tarball:
        fetch = f"cp {shlex.quote(entry.nginx_tarball)} {tarball}"
    source = shlex.quote(entry.nginx_tarball or "nginx.org")
    return f"""\
    {fetch} || exit 1
    sum=$(sha256sum <{tarball}) && sum=${{sum%% *}}
    if [ "$sum" != {entry.nginx_sha256} ]; then
        echo "pd-deploy: expected {_NGINX} from "{source}" with SHA-256" \\
            "{entry.nginx_sha256}, found $sum"
        exit 1
    fi"""
