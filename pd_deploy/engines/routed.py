"""What the engines have in common whose servers find each other through a router. Pure.

P and D need no ranktable and no order, so nothing is read of devices; the router's start script
opens it in two steps, first to the smoke test alone. Routers take their port alone, seconds after
they were started; with `proxy.hold` a relay has the port in their place, and shares it.
"""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, Literal

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment, Settings
from pd_deploy.config.topology import Instance, Pod, Proxy, Topology
from pd_deploy.engines import ascend
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
    flags,
    instance_of,
    longest_sequence,
    mounts,
    secrets,
    text,
    title,
)
from pd_deploy.engines.device_report import DeviceTools
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.errors import Problem
from pd_deploy.hosts.container_values import ContainerSpec, DeviceRequest

Router = Callable[[str, str], Sequence[str]]
"""Writes the router's command, given the address and the port where it listens."""
_RELAY = resources.files(__package__).joinpath("relay_program.py").read_text()
_RELAYED = "# The router can't share its port. This can, and passes connections on to the router."
_INNER_PORT = "$inner"  # known only where the script runs


class RoutedEngine(ABC):
    """An engine behind a router: all but how its servers and its router are called.

    Attributes:
        PACKAGE: what its servers import of its source code.
        ROUTER_CHECKS_EVERY_S: seconds between two of the router's looks at a server.
    """

    PACKAGE: str
    ROUTER_CHECKS_EVERY_S: int
    BY_CONTRACT = False
    STARTED = "pd-deploy: starting"
    PREPARED = "pd-deploy: proxy prepared"
    OPEN = "pd-deploy: proxy open"
    PROVING = f"{OPEN} to the smoke test"
    OPENED = f"{OPEN} to clients"
    OPEN_SIGNAL = "SIGUSR1"
    DERIVED_PROXY_ENVIRONMENT = frozenset({"PYTHONUNBUFFERED"})
    DERIVED_PROXY_ARGUMENTS = frozenset({
        "decode", "host", "policy", "port", "prefill", "prometheus-host", "prometheus-port",
    })  # fmt: skip
    UNUSED_KEYS: tuple[str, ...] = (
        "code.install", "compat", "contract", "decode_engine_id", "http_proxy",
        "kv_connector_extra_config", "kv_parallel_size", "ports.ray", "proxy.*.core_num",
        "proxy.*.decode_lb_sdk", "proxy.*.log_level", "proxy.*.nginx_sha256",
        "proxy.*.nginx_tarball", "proxy.*.pass_through", "proxy.*.prefill_lb_sdk",
        "proxy.*.prefix_aware", "proxy.*.program", "proxy.*.start_core_index",
        "supports.server_offset", "supports.tensor_parallel",
    )  # fmt: skip

    @abstractmethod
    def _server_command(self, service: Service, instance: Instance) -> list[str]:
        """Write the command of an instance's server."""

    @abstractmethod
    def _server_environment(self, service: Service, instance: Instance) -> dict[str, Scalar]:
        """Return the variables of an instance's server."""

    @abstractmethod
    def _router_program(self, service: Service) -> list[str]:
        """Return the words that run the router, without arguments."""

    @abstractmethod
    def _backends(self, topology: Topology) -> list[str]:
        """Write the arguments that tell the router its servers."""

    @abstractmethod
    def _answered(self, topology: Topology) -> str:
        """Write the lines of shell after which `$status` is 200 once the router serves; its answer
        to /readiness is at descriptor 3."""

    def read_addresses_command(self, deployment: Deployment, devices: Sequence[int]) -> list[str]:
        """Run nothing: peers are found by their hosts' addresses."""
        return []

    def parse_addresses(self, output: str, devices: Sequence[int], *, host: str) -> dict[int, str]:
        """Return none."""
        return {}

    def check_facts(self, deployment: Deployment, facts: Mapping[str, HostFacts]) -> None:
        """Check nothing: every server is told its host's address, and asks for no device's."""
        return

    def shares_port(self, _: Proxy, start_script: str) -> bool:
        """Tell whether a relay has the port: the router takes one alone."""
        return _RELAYED in start_script.splitlines()

    def ranktables(self, service: Service) -> Mapping[str, Mapping[str, str]]:
        """Return none."""
        return {}

    def restarts_with(self, _: Deployment, topology: Topology, name: str) -> frozenset[str]:
        """Return the members of its pod: peers and router find a new server at the old address."""
        return frozenset(member.name for member in topology.pod_of(name).members)

    def starts_after(
        self, deployment: Deployment, topology: Topology, name: str
    ) -> tuple[str, ...]:
        """Return none: all load at the same time."""
        return ()

    def device_users_command(self) -> list[str]:
        """Run nothing: each kind of device tells its users differently."""
        return []

    def device_users(self, output: str, devices: Sequence[int], host: str) -> Mapping[int, str]:
        """Return nobody, as far as can be told."""
        return {}

    def device_health_command(self, devices: Sequence[int]) -> list[str]:
        """Run nothing: each kind of device tells its health differently."""
        return []

    def faulty_devices(self, output: str, devices: Sequence[int]) -> Mapping[int, str]:
        """Return none, as far as can be told."""
        return {}

    def device_tools(self, deployment: Deployment) -> DeviceTools | None:
        """Return those of Ascend's NPUs, where it runs on them."""
        return ascend if _has_device_files(deployment) else None

    def probe_command(self) -> list[str]:
        """Return no command: images are not asked."""
        return []

    def parse_probe(self, _: str) -> ImageFacts:
        """Return no facts: images are not asked."""
        return ImageFacts()

    def for_image(self, deployment: Deployment, _: ImageFacts) -> Deployment:
        """Return the deployment as it is: nothing depends on the image."""
        return deployment

    def image_findings(
        self, _deployment: Deployment, _topology: Topology, _: ImageFacts | None
    ) -> Iterator[Finding]:
        """Yield nothing: no rule depends on the image."""
        yield from ()

    def proxy_metrics(self, deployment: Deployment, proxy: Proxy) -> MetricsPage | None:
        """Return a router's page, if the file opens it."""
        options = deployment.router
        if options is None or not options.router_metrics_open:
            return None
        return MetricsPage(f"{proxy.address}:{options.router_metrics_port}")

    def code_place(self, deployment: Deployment) -> CodePlace:
        """Take the place of source code from the file: each builder of images has its own. The
        router is no part of the engine's tree."""
        own = deployment.own_code
        path, package = (own.path, own.package) if own else (None, None)
        return CodePlace(path or "", package or self.PACKAGE, of_proxy=None)

    def zmq_step(self, deployment: Deployment) -> int:
        """Return 1; profiles give what their connector takes."""
        return 1

    def further_ports(
        self,
        deployment: Deployment,
        role: Literal["prefill", "decode"],
        devices: Sequence[int],
        api_ports: Sequence[int],
        settings: Settings,
    ) -> Mapping[str, int]:
        """Return none."""
        return {}

    def longest_prompt(self, deployment: Deployment, topology: Topology) -> int:
        """Return the tokens of the longest prompt and its answer; a long prompt is split."""
        return longest_sequence(deployment)

    def cache_busting_fields(self, nonce: str) -> dict[str, Any]:
        """Return a salt of its own, which keeps blocks of a prefix cache apart from others."""
        return {"cache_salt": nonce}

    def container(self, service: Service, name: str) -> ContainerSpec:
        """Specify the container of an instance or of a proxy; the server is its main process.

        All GPUs of the host are visible in a server's container, so that servers on one host can
        move KV from device to device; which of them it uses says its environment.
        """
        options, instance = service.deployment.container, instance_of(service, name)
        prefix = getattr(options.names, instance.role if instance else "proxy")
        further = instance.settings.container_devices if instance else ()
        files = (*options.devices, *further)
        if instance and _has_device_files(service.deployment) and not options.privileged:
            files = (*options.devices, *(f"/dev/davinci{d}" for d in instance.devices), *further)
        return ContainerSpec(
            name=f"{prefix}_{name}_{service.layout.generation}",
            image=service.pinned_image,
            entrypoint=("bash",),
            command=(service.layout.start_script(name),),
            mounts=mounts(
                service, name, after=code_mounts(service, name, self.code_place(service.deployment))
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

    def start_script(self, service: Service, name: str) -> str:
        """Write the script that is the container's main process."""
        instance = instance_of(service, name)
        if instance:
            environment = self.environment(service, name)
            command = self._server_command(service, instance)
            return _server_script(service, instance, environment, command)
        proxy = service.topology.proxy(name)
        write = _behind_relay if proxy.entry.hold else _at_its_port
        router = partial(self._router_command, service, proxy)
        return write(service, proxy, router, self._answered(service.topology))

    def command(self, service: Service, name: str) -> list[str]:
        """Write the command of an instance's server, or of the router."""
        if instance := instance_of(service, name):
            return self._server_command(service, instance)
        proxy = service.topology.proxy(name)
        return _proxy_command(proxy, partial(self._router_command, service, proxy))

    def _router_command(self, service: Service, proxy: Proxy, host: str, port: str) -> list[str]:
        """Write the command of a router that listens there.

        The policy is in the file: round robin uses every prefill, while the routers' own default
        may send all prompts, or those that begin alike, to one.
        """
        options = service.deployment.router
        assert options is not None, "the rule engine-keys demands it"
        # What the file's own arguments of the proxy may replace.
        tuning: dict[str, Scalar] = {
            "worker-startup-timeout-secs": 50,  # servers are ready before the router starts
            "worker-startup-check-interval": 1,
            "health-check-interval-secs": self.ROUTER_CHECKS_EVERY_S,
            "health-failure-threshold": 2,
            "health-success-threshold": 1,
        }
        return [
            *self._router_program(service),
            "--host", host,
            "--port", port,
            "--prometheus-host", proxy.address if options.router_metrics_open else "127.0.0.1",
            "--prometheus-port", str(options.router_metrics_port),
            *self._backends(service.topology),
            "--policy", options.router_policy,
            *flags(tuning | dashed(proxy.entry.arguments)),
        ]  # fmt: skip

    def environment(self, service: Service, name: str) -> dict[str, str]:
        """Return the variables that the start script exports."""
        instance = instance_of(service, name)
        if instance is None:
            return _proxy_environment(service.topology.proxy(name))
        values = self._server_environment(service, instance)
        return {key: text(value) for key, value in values.items()}


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


def dashed(arguments: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Name arguments as routers do, which take each only once."""
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def _has_device_files(deployment: Deployment) -> bool:
    """Tell whether devices are files of Ascend's driver."""
    return deployment.router is not None and deployment.router.device == "npu"


def _proxy_environment(proxy: Proxy) -> dict[str, str]:
    """Return the variables that a router's start script exports."""
    in_file = proxy.entry.environment
    return {"PYTHONUNBUFFERED": "1"} | {key: text(value) for key, value in in_file.items()}


def _server_script(
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
echo {shlex.quote(f"{RoutedEngine.STARTED} {instance.role} {instance.name}")}
exec {shlex.join(command)}
"""


def _proxy_command(proxy: Proxy, router: Router) -> list[str]:
    """Write the router's command as clients are served by it: with `proxy.hold` behind the relay,
    at a port of the loopback that the script finds free."""
    at_port, behind_relay = ("0.0.0.0", str(proxy.port)), (PROVING_ADDRESS, _INNER_PORT)  # noqa: S104
    return [*router(*(behind_relay if proxy.entry.hold else at_port))]


def _at_its_port(service: Service, proxy: Proxy, router: Router, answered: str) -> str:
    """Write a script that checks that the router is there and takes its arguments, and waits to be
    opened to the smoke test alone, then to clients. It ends when the router does.

    Asked is /readiness: /health says nothing of this with one router, and fails as soon as any
    server is down with the other.

    Start the router where the smoke test asks, and again where clients ask.
    """
    return f"""\
#!/bin/bash
{title(service, proxy.name)}
{secrets(service)}{exports(_proxy_environment(proxy))}
trap 'exit 0' INT TERM
proving=({shlex.join(router(PROVING_ADDRESS, str(proxy.port)))})
router=({shlex.join(_proxy_command(proxy, router))})
{_runs_router('"${router[@]}" --help', proxy.port, answered)}
until_ready() {{
    until ready "$1"; do
        kill -0 "$router_pid" || {{ echo "pd-deploy: the router ended"; exit 1; }}
        sleep 0.2
    done
}}
{ONE_STEP_ON}
echo {shlex.quote(RoutedEngine.PREPARED)}
one_step_on
"${{proving[@]}}" & router_pid=$!
until_ready {PROVING_ADDRESS}
echo {shlex.quote(RoutedEngine.PROVING)}
one_step_on
kill "$router_pid"
while kill -0 "$router_pid" 2>/dev/null; do wait "$router_pid"; done
"${{router[@]}}" & router_pid=$!
trap 'stopped=1; kill "$router_pid"' INT TERM
until_ready {proxy.address}
echo {shlex.quote(RoutedEngine.OPENED)}
while kill -0 "$router_pid" 2>/dev/null; do wait "$router_pid"; done
[ -n "$stopped" ] || {{ echo "pd-deploy: the router ended"; exit 1; }}
"""


def _behind_relay(service: Service, proxy: Proxy, router: Router, answered: str) -> str:
    """Write such a script that starts the router once, and has the relay listen for it: first where
    the smoke test asks, then where clients ask. Told to stop, the relay tells the router."""
    words = (
        f'"{word}"' if word == _INNER_PORT else shlex.quote(word)
        for word in _proxy_command(proxy, router)
    )
    return f"""\
#!/bin/bash
{title(service, proxy.name)}
{secrets(service)}{exports(_proxy_environment(proxy))}
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
echo {shlex.quote(RoutedEngine.PREPARED)}
one_step_on
# Another one, as servers take free ports while they load.
inner=$(relay port {PROVING_ADDRESS})
router & router_pid=$!
relay serve {PROVING_ADDRESS} 0.0.0.0 {proxy.port} "$inner" "$router_pid" & relay_pid=$!
until_ready {PROVING_ADDRESS}
echo {shlex.quote(RoutedEngine.PROVING)}
one_step_on
trap 'stopped=1; kill "$relay_pid"' INT TERM
kill -USR1 "$relay_pid"
until_ready {proxy.address}
echo {shlex.quote(RoutedEngine.OPENED)}
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
