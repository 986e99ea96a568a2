"""Printing a plan as one shell script per host: to compare with today's, or to run by hand."""

import json
import shlex
from string import ascii_letters

from pd_deploy import engines
from pd_deploy.config.fields import archive_of
from pd_deploy.config.models import DOCKER_SOCKET, Deployment
from pd_deploy.config.topology import Proxy, Topology
from pd_deploy.hosts import docker_create
from pd_deploy.planning.plans import HostPlan, Plan, PlannedFile
from pd_deploy.steps.verify import requests

_END = "PD_DEPLOY_END"


def script(deployment: Deployment, placed: Topology, made: Plan, host: str) -> str:
    """Write the script that does on a host, as root, what a run does there.

    All hosts' scripts have to run at the same time: servers wait for each other while they load,
    and the script on a proxy's host opens its port when all are ready.
    """
    planned = made.hosts[host]
    lines = [
        "#!/bin/sh",
        f"# {made.deployment}, generation {made.generation}: run this as root on host {host} "
        f"({planned.address})",
        "set -eu",
        *_engine(deployment.hosts[host].docker_socket),
        "",
        *_image(deployment, made),
        shlex.join(["mkdir", "-p", *planned.directories]),
    ]
    for file in planned.files:
        lines += ["", *_write(file)]
    for instance in planned.instances.values():
        lines += ["", _wrapped(docker_create.command(instance.container))]
    lines += ["", shlex.join(["docker", "start", *_names(planned)])]
    for proxy in placed.proxies_on(host):
        lines += ["", *_open(deployment, placed, made, proxy)]
    return "\n".join(lines) + "\n"


def _image(deployment: Deployment, made: Plan) -> list[str]:
    """Bring the image to the host; one in a file lies there under the same path, copied by hand."""
    if archive := archive_of(deployment.image):
        return [shlex.join(["docker", "load", "--input", archive])]
    if made.pinned_image.startswith("sha256:"):
        return []  # the hosts have it: `pull: never`
    return [shlex.join(["docker", "pull", made.pinned_image])]


def _engine(socket: str) -> list[str]:
    return (
        [] if socket == DOCKER_SOCKET else [f"export DOCKER_HOST={shlex.quote(f'unix://{socket}')}"]
    )


def _names(planned: HostPlan) -> list[str]:
    return [instance.container.name for instance in planned.instances.values()]


def _write(file: PlannedFile) -> list[str]:
    target, content = shlex.quote(file.path), file.content.removesuffix("\n")
    # dash loses a byte of a line that is not ASCII and begins as the end of the here-document.
    taken = {line[0] for line in content.split("\n") if not line.isascii()}
    end = next((c for c in _END[0] + ascii_letters if c not in taken), _END[0]) + _END[1:]
    # A line of the content must not end the here-document: the lines after it would be commands.
    while end in content:
        end += "_"
    return [f"install -m {file.mode} /dev/stdin {target} <<'{end}'", content, end]


def _wrapped(argv: list[str]) -> str:
    """Write one option per line."""
    words = [shlex.quote(word) for word in argv]
    return " ".join(words[:2]) + "".join(
        f" \\\n  {word}" if word.startswith("--") else f" {word}" for word in words[2:]
    )


def _open(deployment: Deployment, placed: Topology, made: Plan, proxy: Proxy) -> list[str]:
    servers = " ".join(server for pod in placed.pods for server in pod.servers)
    container = made.instance(proxy.name).container.name
    signal = engines.get(deployment.engine).OPEN_SIGNAL
    url, body = requests.completion(deployment, proxy)
    header = "content-type: application/json"
    # nginx needs some seconds to reopen its port.
    ask = ["curl", "-fsS", "--retry", "20", "--retry-delay", "1", "--retry-all-errors", "-H"]
    return [
        "# the proxy opens its port when every server is ready",
        f"for server in {servers}; do",
        '  until curl -fsS -o /dev/null "http://$server/health" 2>/dev/null; do sleep 1; done',
        "done",
        "# first to the smoke test alone, then to clients",
        shlex.join(["docker", "kill", "--signal", signal, container]),
        shlex.join(["docker", "kill", "--signal", signal, container]),
        shlex.join([*ask, header, "-d", json.dumps(body), url]),
    ]
