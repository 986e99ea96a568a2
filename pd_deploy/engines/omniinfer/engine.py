"""omni-infer on Ascend, as `Engine` wants it said.

Values follow the QwQ-32B template; where it is faulty the corrected value is used unless the file
says `compat: upstream`. `corrections` lists every difference, `contracts` what images of different
ages expect. Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pd_deploy.config.models import Deployment, InstanceEntry, Settings
from pd_deploy.config.topology import Instance, Topology
from pd_deploy.engines import ascend, common
from pd_deploy.engines.base import CodePlace, Counter, Counters, HostFacts, Member, Service
from pd_deploy.engines.common import code_mounts, instance_of, longest_sequence, mount, mounts
from pd_deploy.engines.device_report import DeviceTools
from pd_deploy.engines.load_generator import LoadGenerator, vllm_bench
from pd_deploy.engines.omniinfer import (
    by_image,
    kv,
    launcher,
    npu_smi,
    proxy,
    ranktable,
    rules,
)
from pd_deploy.engines.omniinfer import (
    environment as environments,
)
from pd_deploy.engines.omniinfer.contracts import contract_of
from pd_deploy.engines.omniinfer.corrections import corrected
from pd_deploy.errors import FactsError
from pd_deploy.hosts.container_values import ContainerSpec, Mount

AT_ONCE = False
BY_CONTRACT = True
HANDOVER_FIELDS = "kv_transfer_params"
TAKES_TOKEN_IDS = True
UNUSED_KEYS: tuple[str, ...] = ("sglang", "vllm")
DERIVED_ARGUMENTS = rules.DERIVED_ARGUMENTS
DERIVED_ENVIRONMENT = rules.DERIVED_ENVIRONMENT
DERIVED_PROXY_ARGUMENTS = rules.DERIVED_PROXY_ARGUMENTS
DERIVED_PROXY_ENVIRONMENT = rules.DERIVED_PROXY_ENVIRONMENT
findings = rules.findings
proxy_metrics = proxy.metrics
shares_port = proxy.shares_port
probe_command = by_image.probe_command
parse_probe = by_image.parse_probe
for_image = by_image.for_image
image_findings = by_image.image_findings
parse_addresses = ranktable.parse_addresses
prefill_request = common.prefill_request
decode_request = common.decode_request
tensor_parallel = common.tensor_parallel
kv_transfer_config = kv.transfer_config
STARTED = launcher.STARTED
PREPARED = proxy.PREPARED
OPEN = proxy.OPEN
PROVING = proxy.PROVING
OPENED = proxy.OPENED
OPEN_SIGNAL = "SIGUSR1"
BASE_PORT = "VLLM_LLMDATADIST_BASE_PORT"
"""Variable that moves the ports which a contract fixes, in images that read it."""
# Images of its time count no sources of prompt tokens; those that follow a newer vLLM do.
COUNTERS = Counters(
    served=Counter("vllm:request_success_total"),
    kv_tokens=Counter("vllm:prompt_tokens_by_source_total", (("source", "external_kv_transfer"),)),
    kv_bytes=Counter("standin:kv_transfer_bytes_total"),
)


def members(
    deployment: Deployment,
    role: Literal["prefill", "decode"],
    devices: Sequence[int],
    tensor_parallel: int,
) -> Sequence[Member]:
    """Give a prefill one API server, on its master, and a decode one per copy of the model. Their
    KV is asked for at one port per pod and host, or at one per device."""
    per_device = contract_of(deployment).binds_kv_ports
    if role == "prefill":
        return [
            Member(int(not index), int(not index), count if per_device else int(not index))
            for index, count in enumerate(devices)
        ]
    return [
        Member(ranks=copies, servers=copies, kv_ports=count if per_device else 1)
        for count in devices
        for copies in [max(1, count // tensor_parallel)]
    ]


def zmq_step(deployment: Deployment) -> int:
    """Return as many ports as a pod may bind on a host."""
    return deployment.devices_per_host if contract_of(deployment).binds_kv_ports else 1


def further_ports(
    deployment: Deployment,
    role: Literal["prefill", "decode"],
    devices: Sequence[int],
    api_ports: Sequence[int],
    settings: Settings,
) -> Mapping[str, int]:
    """List the ports that the contract fixes for prefills, and those of their cache events. What an
    environment says of the fixed ones is believed; not all images have been seen to read it."""
    ports: dict[str, int] = {}
    fixed = contract_of(deployment).fixed_ports
    if role == "prefill" and fixed:
        given = str(settings.environment.get(BASE_PORT, ""))
        first_worker = int(given) if given.isdecimal() else fixed + 1
        # They are called after what moves them, for the message of a file whose pods collide.
        ports[f"{BASE_PORT} - 1"] = first_worker - 1
        ports |= {f"{BASE_PORT} + {rank}": first_worker + rank for rank in range(len(devices))}
    if role == "prefill" and api_ports and environments.is_prefix_aware(deployment):
        ports["events"] = api_ports[0] + launcher.EVENTS_PORT_OFFSET
    return ports


def code_place(deployment: Deployment) -> CodePlace:
    """Put a tree in the place of the image's own."""
    return environments.code_place(deployment)


def read_addresses_command(deployment: Deployment, devices: Sequence[int]) -> list[str]:
    """Print the devices' addresses, which ranktables have; nothing where there are none."""
    if not contract_of(deployment).has_ranktables:
        return []
    return ranktable.read_addresses_command(devices)


def check_facts(deployment: Deployment, facts: Mapping[str, HostFacts]) -> None:
    """Check that devices have addresses of their own, and that hosts announce theirs.

    Raises:
        FactsError: names all devices that share an address, or all hosts that others would ask at
            another address than the file's.
    """
    if contract_of(deployment).announces_route:
        _check_routes(deployment, facts)
    ranktable.check_addresses({name: of.device_addresses for name, of in facts.items()})


def longest_prompt(deployment: Deployment, topology: Topology) -> int:
    """Return the tokens of the longest prompt, answer included: one that takes more than a step's
    budget is never scheduled, unless prompts are split (contract section 4.6)."""
    if contract_of(deployment).splits_prompts:
        return longest_sequence(deployment)
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


def load_generator(deployment: Deployment, topology: Topology) -> LoadGenerator:
    """Return vLLM's. The launcher lets servers run code that lies beside the model, always."""
    return vllm_bench("vllm", trusts_code=True)


def container(service: Service, name: str) -> ContainerSpec:
    """Specify the container of an instance or of a proxy (contract section 2.1).

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
        environment=environments.of_container(service, name),
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
    if instance := instance_of(service, name):
        return launcher.script(service, instance)
    return proxy.script(service, service.topology.proxy(name))


def ranktables(service: Service) -> Mapping[str, Mapping[str, str]]:
    """Render the ranktables; none where the engine reads none."""
    return ranktable.files(service) if contract_of(service.deployment).has_ranktables else {}


def starts_after(deployment: Deployment, topology: Topology, name: str) -> tuple[str, ...]:
    """Start a prefill on one host once decode has started, and decode once the prefills that span
    hosts have: all link to each other while loading, so none can wait for another to be ready
    (contract sections 3.3 and 4.5). Those that link on demand start in any order."""
    instance = topology.instance(name)
    if instance is None or instance.uses_ray or not contract_of(deployment).has_ranktables:
        return ()
    if instance.role == "prefill":
        return topology.decode_names
    return topology.ray_names


def restarts_with(deployment: Deployment, topology: Topology, name: str) -> frozenset[str]:
    """Return everything where links are made while loading: a server that starts alone can't join
    again. Where they are made on demand, return its pod, and global_proxy, whose balancer goes on
    with wrong counts of a server that it has lost."""
    contract = contract_of(deployment)
    if contract.has_ranktables:
        return frozenset(topology.names)
    pod = frozenset(member.name for member in topology.pod_of(name).members)
    return pod.union(topology.proxy_names if contract.program(deployment) == "global" else ())


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


def device_tools(deployment: Deployment) -> DeviceTools | None:
    """Return those of Ascend's NPUs."""
    return ascend


def command(service: Service, name: str) -> list[str]:
    """Return the launcher's arguments for an instance, or those of the proxy's script."""
    if instance := instance_of(service, name):
        return launcher.command(service, instance)
    return proxy.command(service, service.topology.proxy(name))


def environment(service: Service, name: str) -> dict[str, str]:
    """Return the variables that the start script exports, after the image's own ~/.bashrc."""
    if instance := instance_of(service, name):
        return environments.of_server(service, instance)
    return proxy.environment(service, service.topology.proxy(name))


def _check_routes(deployment: Deployment, facts: Mapping[str, HostFacts]) -> None:
    wrong = []
    for name in dict.fromkeys(host for pod in _pods(deployment) for host in pod.on):
        address, route = deployment.hosts[name].address, facts[name].route_address
        if route != address:
            shown = route or "no default route"
            wrong.append(f"{address} of host {name} (found {shown})")
    if wrong:
        raise FactsError(
            f"expected hosts to have the file's address on their default route, because engines of "
            f"contract {contract_of(deployment).name} tell each other the address that is there: "
            f"{', '.join(wrong)}",
            hint="give `hosts` the addresses that `ip route get 8.8.8.8` shows as src on each, or "
            "change the routes",
        )


def _pods(deployment: Deployment) -> list[InstanceEntry]:
    return [*deployment.prefill.values(), *deployment.decode.values()]


def _mounts(service: Service, name: str) -> tuple[Mount, ...]:
    deployment = service.deployment
    shared_tmp = [] if corrected(deployment, "no-shared-tmp") else [mount("/tmp")]  # noqa: S108
    after = code_mounts(service, name, code_place(deployment))
    if isinstance(deployment.code, str) and deployment.code != "image":
        after.append(mount(deployment.code))
    is_server = instance_of(service, name) is not None
    tarball = None if is_server else service.topology.proxy(name).entry.nginx_tarball
    if tarball:
        after += [mount(tarball, read_only=True)]
    return mounts(service, name, before=shared_tmp, after=after)


def _devices(service: Service, instance: Instance | None) -> tuple[str, ...]:
    options = service.deployment.container
    if instance is None:
        return options.devices
    npus = () if options.privileged else (f"/dev/davinci{d}" for d in instance.devices)
    return tuple(dict.fromkeys((*options.devices, *npus, *instance.settings.container_devices)))
