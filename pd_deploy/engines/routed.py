"""What the engines have in common whose servers find each other through a router. Pure.

P and D need no ranktable and no order, so nothing is read of devices; the router's start script
opens it in two steps, first to the smoke test alone. Routers take their port alone, seconds after
they were started; with `proxy.hold` a relay has the port in their place, and shares it.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Instance, Pod, Proxy, Topology
from pd_deploy.engines.base import (
    PROVING_ADDRESS,
    CodePlace,
    Finding,
    HostFacts,
    MetricsPage,
    Service,
)
from pd_deploy.engines.common import (
    ONE_STEP_ON,
    code_mounts,
    exports,
    instance_of,
    mounts,
    secrets,
    text,
    title,
)
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.errors import Problem
from pd_deploy.hosts.container_values import ContainerSpec, DeviceRequest

STARTED = "pd-deploy: starting"
PREPARED = "pd-deploy: proxy prepared"
OPEN = "pd-deploy: proxy open"
PROVING = f"{OPEN} to the smoke test"
OPENED = f"{OPEN} to clients"
OPEN_SIGNAL = "SIGUSR1"
Router = Callable[[str, str], Sequence[str]]
"""Writes the router's command, given the address and the port where it listens."""
_RELAY = resources.files(__package__).joinpath("relay_program.py").read_text()
_RELAYED = "# The router can't share its port. This can, and passes connections on to the router."
_INNER_PORT = "$inner"  # known only where the script runs
DERIVED_PROXY_ENVIRONMENT = frozenset({"PYTHONUNBUFFERED"})
UNUSED_KEYS: tuple[str, ...] = (
    "code.install", "compat", "contract", "decode_engine_id", "http_proxy",
    "kv_connector_extra_config", "kv_parallel_size", "ports.ray", "proxy.*.core_num",
    "proxy.*.decode_lb_sdk",
    "proxy.*.log_level", "proxy.*.nginx_sha256", "proxy.*.nginx_tarball", "proxy.*.pass_through",
    "proxy.*.prefill_lb_sdk", "proxy.*.prefix_aware", "proxy.*.program", "proxy.*.start_core_index",
    "supports.server_offset", "supports.tensor_parallel",
)  # fmt: skip


def read_addresses_command(deployment: Deployment, devices: Sequence[int]) -> list[str]:
    """Run nothing: peers are found by their hosts' addresses."""
    return []


def parse_addresses(output: str, devices: Sequence[int], *, host: str) -> dict[int, str]:
    """Return none."""
    return {}


def check_facts(deployment: Deployment, facts: Mapping[str, HostFacts]) -> None:
    """Check nothing: every server is told its host's address, and asks for no device's."""


def shares_port(_: Proxy, start_script: str) -> bool:
    """Tell whether a relay has the port: the router takes one alone."""
    return _RELAYED in start_script.splitlines()


def ranktables(service: Service) -> Mapping[str, Mapping[str, str]]:
    """Return none."""
    return {}


def restarts_with(_: Deployment, topology: Topology, name: str) -> frozenset[str]:
    """Return the members of its pod: peers and router find a new server at the old address."""
    return frozenset(member.name for member in topology.pod_of(name).members)


def starts_after(deployment: Deployment, topology: Topology, name: str) -> tuple[str, ...]:
    """Return none: all load at the same time."""
    return ()


def device_users_command() -> list[str]:
    """Run nothing: each kind of device tells its users differently."""
    return []


def device_users(output: str, devices: Sequence[int], host: str) -> Mapping[int, str]:
    """Return nobody, as far as can be told."""
    return {}


def device_health_command(devices: Sequence[int]) -> list[str]:
    """Run nothing: each kind of device tells its health differently."""
    return []


def faulty_devices(output: str, devices: Sequence[int]) -> Mapping[int, str]:
    """Return none, as far as can be told."""
    return {}


def code_place(deployment: Deployment, package: str) -> CodePlace:
    """Take the place of source code from the file: each builder of images has its own. The router
    is no part of the engine's tree."""
    own = deployment.own_code
    return CodePlace((own and own.path) or "", (own and own.package) or package, of_proxy=None)


def code_findings(deployment: Deployment) -> Iterator[Finding]:
    """Demand that the file says where the image has its code."""
    if isinstance(deployment.code, str) and deployment.code != "image":
        message = "expected `image` or `{source: …, path: …}`, found a directory on the hosts"
        yield "code-path", Problem("code", message)
    elif deployment.own_code and not deployment.own_code.path:
        message = (
            "is missing: where the image has the tree, such as /vllm-workspace/vllm-ascend; "
            "`pip show -f PACKAGE` in a container of it says where"
        )
        yield "code-path", Problem("code.path", message)


def container(service: Service, name: str, *, has_device_files: bool) -> ContainerSpec:
    """Specify the container of an instance or of a proxy; the server is its main process.

    All GPUs of the host are visible in a server's container, so that servers on one host can move
    KV from device to device; which of them it uses says its environment.

    Args:
        has_device_files: whether devices are files of Ascend's driver.
    """
    options, instance = service.deployment.container, instance_of(service, name)
    prefix = getattr(options.names, instance.role if instance else "proxy")
    further = instance.settings.container_devices if instance else ()
    files = (*options.devices, *further)
    if instance and has_device_files and not options.privileged:
        files = (*options.devices, *(f"/dev/davinci{d}" for d in instance.devices), *further)
    return ContainerSpec(
        name=f"{prefix}_{name}_{service.layout.generation}",
        image=service.pinned_image,
        entrypoint=("bash",),
        command=(service.layout.start_script(name),),
        mounts=mounts(
            service, name, after=code_mounts(service, name, code_place(service.deployment, ""))
        ),
        devices=tuple(dict.fromkeys(files)) if instance else (),
        device_requests=(DeviceRequest(count=-1),) if options.gpus and instance else (),
        privileged=options.privileged,
        cap_add=options.cap_add if instance else (),
        ulimits=options.ulimits if instance else {},
        shm_size=options.shm_size,
        network_mode="host",
        user="root",
        working_dir="/root",
        init=True,
        stop_signal="SIGINT",
        stop_timeout=options.stop_timeout,
    )


def proxy_environment(proxy: Proxy) -> dict[str, str]:
    """Return the variables that a router's start script exports."""
    in_file = proxy.entry.environment
    return {"PYTHONUNBUFFERED": "1"} | {key: text(value) for key, value in in_file.items()}


def dashed(arguments: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Name arguments as routers do, which take each only once."""
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def server_script(
    service: Service, instance: Instance, environment: Mapping[str, str], command: Sequence[str]
) -> str:
    """Write a server's start script.

    Read ~/.bashrc first: images for Ascend set up CANN there; our variables come after it.
    """
    return f"""\
#!/bin/bash
{title(service, instance.name)}
[ ! -r ~/.bashrc ] || source ~/.bashrc
{secrets(service)}{exports(environment)}
echo {shlex.quote(f"{STARTED} {instance.role} {instance.name}")}
exec {shlex.join(command)}
"""


def proxy_command(proxy: Proxy, router: Router) -> list[str]:
    """Write the router's command as clients are served by it: with `proxy.hold` behind the relay,
    at a port of the loopback that the script finds free."""
    at_port, behind_relay = ("0.0.0.0", str(proxy.port)), (PROVING_ADDRESS, _INNER_PORT)  # noqa: S104
    return [*router(*(behind_relay if proxy.entry.hold else at_port))]


def proxy_script(service: Service, proxy: Proxy, router: Router, answered: str) -> str:
    """Write a script that checks that the router is there and takes its arguments, and waits to be
    opened to the smoke test alone, then to clients. It ends when the router does.

    Asked is /readiness: /health says nothing of this with one router, and fails as soon as any
    server is down with the other.

    Args:
        answered: the lines of shell after which `$status` is 200 once it serves; its answer to
            /readiness is at descriptor 3.
    """
    write = _behind_relay if proxy.entry.hold else _at_its_port
    return write(service, proxy, router, answered)


def _at_its_port(service: Service, proxy: Proxy, router: Router, answered: str) -> str:
    """Start the router where the smoke test asks, and again where clients ask."""
    return f"""\
#!/bin/bash
{title(service, proxy.name)}
{secrets(service)}{exports(proxy_environment(proxy))}
trap 'exit 0' INT TERM
proving=({shlex.join(router(PROVING_ADDRESS, str(proxy.port)))})
router=({shlex.join(proxy_command(proxy, router))})
{_runs_router('"${router[@]}" --help', proxy.port, answered)}
until_ready() {{
    until ready "$1"; do
        kill -0 "$router_pid" || {{ echo "pd-deploy: the router ended"; exit 1; }}
        sleep 0.2
    done
}}
{ONE_STEP_ON}
echo {shlex.quote(PREPARED)}
one_step_on
"${{proving[@]}}" & router_pid=$!
until_ready {PROVING_ADDRESS}
echo {shlex.quote(PROVING)}
one_step_on
kill "$router_pid"
while kill -0 "$router_pid" 2>/dev/null; do wait "$router_pid"; done
"${{router[@]}}" & router_pid=$!
trap 'stopped=1; kill "$router_pid"' INT TERM
until_ready {proxy.address}
echo {shlex.quote(OPENED)}
while kill -0 "$router_pid" 2>/dev/null; do wait "$router_pid"; done
[ -n "$stopped" ] || {{ echo "pd-deploy: the router ended"; exit 1; }}
"""


def _behind_relay(service: Service, proxy: Proxy, router: Router, answered: str) -> str:
    """Start the router once, and have the relay listen for it: first where the smoke test asks,
    then where clients ask. Told to stop, the relay tells the router."""
    words = (
        f'"{word}"' if word == _INNER_PORT else shlex.quote(word)
        for word in proxy_command(proxy, router)
    )
    return f"""\
#!/bin/bash
{title(service, proxy.name)}
{secrets(service)}{exports(proxy_environment(proxy))}
trap 'exit 0' INT TERM
trap '' PIPE  # the relay closes connections for which it finds no router
{_RELAYED}
IFS= read -r -d '' relay_program <<'END_OF_PROGRAM'
{_RELAY}END_OF_PROGRAM
relay() {{
    # ~/.bashrc says which Python an image has.
    source ~/.bashrc >/dev/null 2>&1
    exec "$(command -v python3 || command -v python)" -I -c "$relay_program" "$@"
}}
inner=$(relay port {PROVING_ADDRESS}) || {{ echo "pd-deploy: proxy.hold needs Python"; exit 1; }}
router() {{ exec {" ".join(words)} "$@"; }}
{_runs_router("(router --help)", proxy.port, answered)}
both_run() {{ kill -0 "$router_pid" && kill -0 "$relay_pid"; }} 2>/dev/null
until_ready() {{
    until ready "$1"; do
        both_run || {{ echo "pd-deploy: the router ended"; exit 1; }}
        sleep 0.2
    done
}}
{ONE_STEP_ON}
echo {shlex.quote(PREPARED)}
one_step_on
# Another one, as servers take free ports while they load.
inner=$(relay port {PROVING_ADDRESS})
router & router_pid=$!
relay serve {PROVING_ADDRESS} 0.0.0.0 {proxy.port} "$inner" "$router_pid" & relay_pid=$!
until_ready {PROVING_ADDRESS}
echo {shlex.quote(PROVING)}
one_step_on
trap 'stopped=1; kill "$relay_pid"' INT TERM
kill -USR1 "$relay_pid"
until_ready {proxy.address}
echo {shlex.quote(OPENED)}
while both_run; do wait -n; done
kill "$router_pid" "$relay_pid" 2>/dev/null
while kill -0 "$router_pid" || kill -0 "$relay_pid"; do wait; done 2>/dev/null
[ -n "$stopped" ] || {{ echo "pd-deploy: the router ended"; exit 1; }}
"""


def _runs_router(helping: str, port: int, answered: str) -> str:
    """Write what tells whether the router can be run, by a command that has it print its help, and
    whether it is ready."""
    return f"""\
# --help comes last: all arguments before it are read, and nothing is started.
{helping} >/dev/null || {{ echo "pd-deploy: the router can't be run so"; exit 1; }}
ready() {{
    exec 3<>/dev/tcp/"$1"/{port} || return
    printf 'GET /readiness HTTP/1.0\\r\\n\\r\\n' >&3
{answered}
    exec 3>&-
    [ "$status" = 200 ]
}} 2>/dev/null"""


def ratio(topology: Topology) -> Iterator[Finding]:
    """Demand sizes of which the larger is a multiple of the smaller."""
    for decode in topology.decode:
        for prefill in topology.prefill:
            yield from _ratio(prefill, decode)


def _ratio(prefill: Pod, decode: Pod) -> Iterator[Finding]:
    small, large = sorted((prefill.tensor_parallel, decode.tensor_parallel))
    if large % small:
        message = (
            f"expected a multiple or a divisor of decode {decode.name}'s tensor parallel size "
            f"({decode.tensor_parallel}), found {prefill.tensor_parallel}"
        )
        yield "tensor-parallel-ratio", Problem(f"{prefill.key}.tensor_parallel", message)


def probe_command() -> list[str]:
    """Return no command: images are not asked."""
    return []


def parse_probe(_: str) -> ImageFacts:
    """Return no facts: images are not asked."""
    return ImageFacts()


def for_image(deployment: Deployment, _: ImageFacts) -> Deployment:
    """Return the deployment as it is: nothing depends on the image."""
    return deployment


def image_findings(
    _deployment: Deployment, _topology: Topology, _: ImageFacts | None
) -> Iterator[Finding]:
    """Yield nothing: no rule depends on the image."""
    yield from ()


def proxy_metrics(deployment: Deployment, proxy: Proxy) -> MetricsPage | None:
    """Return a router's page, if the file opens it."""
    options = deployment.router
    if options is None or not options.router_metrics_open:
        return None
    return MetricsPage(f"{proxy.address}:{options.router_metrics_port}")
