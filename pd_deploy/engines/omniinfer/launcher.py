"""Start scripts and arguments of omni-infer's servers. Pure."""

import json
import shlex

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Instance
from pd_deploy.engines.base import Service
from pd_deploy.engines.common import code_setup, exports, flags, secrets, title
from pd_deploy.engines.omniinfer import environment, kv
from pd_deploy.engines.omniinfer.contracts import contract_of
from pd_deploy.engines.omniinfer.corrections import corrected

STARTED = "pd-deploy: starting"
EVENTS_PORT_OFFSET = 100
"""From a prefill's API port to that of its cache events: omni_proxy reckons with this number."""
_SWITCHES = ("no-enable-prefix-caching", "no-enable-chunked-prefill", "enable-mtp")
_OPTIONS = ("block-size", "num-speculative-tokens")
_RAY_WORKERS = range(10002, 20000)  # ray's defaults
_RAY_JOIN_TIMEOUT_S = 300  # hosts start at the same time, but may be busy with their images

# Starts the launcher so that every bind() may take a port with connections in TIME_WAIT. The
# launcher looks whether its port is free by a plain bind(), which fails for 60 s after any
# connection that the server closed first: a probe that asks for `Connection: close`, an idle
# keep-alive. The server itself binds with SO_REUSEADDR and would start. A port that somebody
# listens on is refused all the same. The other ways: to wait 60 s before each start, or to end
# those sockets by `ss -K`, which kernels of today's hosts (5.10) don't do for TIME_WAIT.
REUSING_PORTS = """\
import os, runpy, socket, sys

def bind(self, address, plain=socket.socket.bind):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    plain(self, address)

socket.socket.bind = bind
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ports_of_ray_workers(deployment: Deployment) -> range:
    """Return the ports of which ray's workers take any, on each host of a prefill that spans some:
    ray's own, up to those that the engine binds."""
    return range(_RAY_WORKERS[0], contract_of(deployment).fixed_ports or _RAY_WORKERS.stop)


def script(service: Service, instance: Instance) -> str:
    """Write the script that starts a server, or has a host join the ray of its pod's master."""
    argv = command(service, instance)
    if instance.api_ports:
        python, *launcher = argv
        argv = [python, "-c", REUSING_PORTS, *launcher]
    code, scripts = environment.code(service.deployment), contract_of(service.deployment).scripts
    return f"""\
#!/bin/bash
{title(service, instance.name)}
source ~/.bashrc
{code_setup(environment.code_place(service.deployment), installs=True)}\
{secrets(service)}{exports(environment.of_server(service, instance))}
cd {shlex.quote(code)}/omniinfer/{scripts} || exit 1
echo {shlex.quote(f"{STARTED} {instance.role} {instance.name}")}
{_ray(service, instance)}exec {shlex.join(argv)}
"""


def command(service: Service, instance: Instance) -> list[str]:
    """Return the arguments of what the script runs in the end."""
    return _launcher(service, instance) if instance.api_ports else _ray_worker(service, instance)


def _launcher(service: Service, instance: Instance) -> list[str]:
    """Write the launcher's command (contract sections 4.2 and 9.2)."""
    model, settings = service.deployment.model, instance.settings
    is_decode = instance.role == "decode"
    longest = model.max_len_decode if is_decode else model.max_len_prefill
    of_launcher = (*_SWITCHES, *_OPTIONS)
    extra = {name: value for name, value in settings.arguments.items() if name not in of_launcher}
    extra |= _events(service, instance)
    if instance.uses_ray:
        extra["distributed-executor-backend"] = "ray"
    fixed_ports = corrected(service.deployment, "fixed-ports")
    renumbers_devices = contract_of(service.deployment).renumbers_devices
    return [
        "python", "start_api_servers.py",
        "--num-servers", str(len(instance.api_ports)),
        *(_data_parallel(service, instance) if is_decode else []),
        "--model-path", model.path,
        "--master-ip", instance.master_address,
        "--master-port", str(instance.master_port),
        "--base-api-port", str(instance.api_port),
        *(["--max-port-attempts", "1"] if fixed_ports else []),
        *(["--use-inventory-devices"] if renumbers_devices else []),
        "--tp", str(instance.tensor_parallel),
        "--served-model-name", model.served_name,
        "--max-model-len", str(longest),
        *flags({name: settings.arguments.get(name, False) for name in of_launcher}),
        *(["--gpu-util", str(settings.gpu_memory_utilization)]
          if settings.gpu_memory_utilization is not None else []),
        "--extra-args", " ".join(flags(extra)),
        *(["--additional-config", json.dumps(settings.additional_config)]
          if settings.additional_config else []),
        "--kv-transfer-config", json.dumps(kv.transfer_config(service, instance)),
        "--log-dir", service.layout.log_directory(instance.name),
    ]  # fmt: skip


def _data_parallel(service: Service, instance: Instance) -> list[str]:
    """Place a decode member's servers among those of its pod (contract section 1.6)."""
    offset, deployment = instance.server_offset, service.deployment
    unit = deployment.supports.server_offset or contract_of(deployment).server_offset
    if unit == "devices":
        offset *= instance.tensor_parallel
    return ["--server-offset", str(offset), "--num-dp", str(instance.data_parallel)]


def _events(service: Service, instance: Instance) -> dict[str, Scalar]:
    """Have a prefill tell omni_proxy which blocks it caches (contract section 9.6). The value has
    no blanks, at which the launcher would split it."""
    if instance.role == "decode" or not environment.is_prefix_aware(service.deployment):
        return {}
    port = instance.api_port + EVENTS_PORT_OFFSET
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "topic": "kv-events",
    }
    return {"kv-events-config": json.dumps(config, separators=(",", ":"))}


def _ray(service: Service, instance: Instance) -> str:
    """Bring up the executor that spans the pod's hosts, on its master (contract section 1.5)."""
    if not (instance.uses_ray and instance.is_master):
        return ""
    nodes = len(instance.pod_addresses)
    head = [
        "ray", "start", "--head", f"--node-ip-address={instance.address}",
        f"--port={instance.ray_port}", f"--num-gpus={len(instance.devices)}",
        *_ports_of_ray_workers(service),
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


def _ray_worker(service: Service, instance: Instance) -> list[str]:
    """Join the master's executor as soon as it listens, and stay as long as it lives."""
    master = f"{instance.master_address}:{instance.ray_port}"
    join = [
        "ray", "start", f"--address={master}", f"--node-ip-address={instance.address}",
        f"--num-gpus={len(instance.devices)}", *_ports_of_ray_workers(service), "--block",
    ]  # fmt: skip
    wait = (
        f"until (: </dev/tcp/{instance.master_address}/{instance.ray_port}) 2>/dev/null; do "
        f"if [ $SECONDS -ge {_RAY_JOIN_TIMEOUT_S} ]; then "
        f'echo "pd-deploy: expected ray to listen on {master} within {_RAY_JOIN_TIMEOUT_S} s" >&2; '
        "exit 1; fi; sleep 0.5; done; "
    )
    return ["bash", "-c", f"{wait}exec {shlex.join(join)}"]


def _ports_of_ray_workers(service: Service) -> list[str]:
    """Keep ray's workers off the ports that the engine binds."""
    ports = ports_of_ray_workers(service.deployment)
    if ports == _RAY_WORKERS:
        return []
    return [f"--min-worker-port={ports[0]}", f"--max-worker-port={ports[-1]}"]
