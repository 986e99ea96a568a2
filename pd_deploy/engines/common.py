"""What the engines have in common: mounts, and pieces of start scripts. Pure."""

import posixpath
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment, MountEntry
from pd_deploy.config.topology import Instance
from pd_deploy.engines.base import CodePlace, Service
from pd_deploy.hosts.container_values import Mount

ONE_STEP_ON = """\
steps=0
trap 'steps=$((steps + 1))' USR1
one_step_on() {
    # A signal ends the wait at once; one that comes just before it is seen a second later.
    while [ "$steps" = 0 ]; do sleep 1 & wait $!; kill $!; done 2>/dev/null
    steps=$((steps - 1))
}"""
"""Shell function of a proxy's script: waits for the next signal; one that comes early counts."""


ENVIRONMENT_FILE = "/run/pd-deploy-environment"
"""Where containers see the file `container.environment_file`."""
NOT_READ = "TREE"
"""What stands for a tree's digest where the tree was not read, as in a plan without hosts."""


def instance_of(service: Service, name: str) -> Instance | None:
    """Return the instance of that name; None for the proxy."""
    return service.topology.instance(name)


def mount(source: str, target: str | None = None, read_only: bool = False) -> Mount:
    """Mount a path of the host, at the same path unless `target` says otherwise."""
    return Mount(source=source, target=target or source, read_only=read_only)


def mounts(
    service: Service, name: str, *, before: Sequence[Mount] = (), after: Sequence[Mount] = ()
) -> tuple[Mount, ...]:
    """List the mounts of a container: the file's own, the logs, the generation's files, the model,
    the time zone. One that the file gives for an instance replaces one of the same target.

    Args:
        before: the engine's, laid over the mounts of all containers.
        after: the engine's, beside the model.
    """
    deployment, layout = service.deployment, service.layout
    zone = f"/usr/share/zoneinfo/{deployment.container.time_zone}"
    instance = instance_of(service, name)
    listed = [*map(_from_file, deployment.container.mounts), *before]
    if secret := deployment.container.environment_file:
        listed.append(mount(secret, ENVIRONMENT_FILE, read_only=True))
    listed += [mount(layout.log_root), mount(layout.directory, read_only=True)]
    listed += [mount(deployment.model.path), *after, mount(zone, "/etc/localtime", read_only=True)]
    listed += map(_from_file, instance.settings.mounts if instance else ())
    return tuple({entry.target: entry for entry in listed}.values())


def code_mounts(service: Service, name: str, place: CodePlace) -> list[Mount]:
    """Mount the source tree that this container sees, where the file has one, over the image's."""
    if service.deployment.own_code is None:
        return []
    tree = service.deployment.code_tree
    if instance_of(service, name):
        digest: str | None = tree.servers if tree else NOT_READ
    else:
        digest = tree.proxy if tree else (None if place.of_proxy is None else NOT_READ)
    return [mount(service.layout.code(digest), place.mounted_at, read_only=True)] if digest else []


def code_setup(place: CodePlace, *, installs: bool) -> str:
    """Write the lines that give a container its own copy of the source tree, in place of the
    image's, and install it there; none where the tree is mounted in that place."""
    if not place.install:
        return ""
    path, parent = shlex.quote(place.path), shlex.quote(posixpath.dirname(place.path))
    copy = f"mkdir -p {parent} && rm -rf {path} && cp -a {place.mounted_at} {path}"
    commands = (copy, *(place.install if installs else ()))
    failed = '{ echo "pd-deploy: the source code could not be installed"; exit 1; }'
    return "".join(f"{command} || {failed}\n" for command in commands)


def flags(arguments: Mapping[str, Scalar]) -> list[str]:
    """Write `--name value` for each argument; true is a bare flag, false leaves it out."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", text(value)]
    return words


def title(service: Service, name: str) -> str:
    """Write the comment that says whose start script it is."""
    deployment, generation = service.deployment.name, service.layout.generation
    return f"# {name} of {deployment}, generation {generation}; written by pd-deploy"


def secrets(service: Service) -> str:
    """Write the lines of a start script that export what only a file on its host has; none
    where the deployment has no such file."""
    if service.deployment.container.environment_file is None:
        return ""
    return f"set -a; . {ENVIRONMENT_FILE} || exit 1; set +a\n"


def exports(environment: Mapping[str, str]) -> str:
    """Write the `export` lines of a start script."""
    return "\n".join(f"export {key}={shlex.quote(value)}" for key, value in environment.items())


def text(value: Scalar) -> str:
    """Write a value as arguments and variables have it; true is 1, false 0."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def tensor_parallel(role: Literal["prefill", "decode"], devices: Sequence[int]) -> int:
    """Return all devices of a prefill, or those of one of a decode's hosts."""
    return sum(devices) if role == "prefill" else devices[0]


def prefill_request(prefill: Instance, body: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """Cut a completion down to what prefill has to do: one token, in one piece."""
    kept = {key: value for key, value in body.items() if key != "stream_options"}
    return {**kept, "max_tokens": 1, "stream": False}


def decode_request(body: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Add what prefill's answer says of its KV to a completion; return None if it says nothing."""
    offered = answer.get("kv_transfer_params")
    return {**body, "kv_transfer_params": offered} if offered else None


def longest_sequence(deployment: Deployment) -> int:
    """Return how many tokens a prompt and its answer may have on both sides."""
    return min(deployment.model.max_len_prefill, deployment.model.max_len_decode)


def _from_file(entry: MountEntry) -> Mount:
    return mount(entry.source, entry.target, entry.read_only)
