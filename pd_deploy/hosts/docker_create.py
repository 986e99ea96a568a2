"""Creating a container: what the Docker Engine API is asked for, and the `docker create` command
that asks for the same. Pure.

A row of `OPTIONS` is an option of both.
"""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pd_deploy.hosts.container_values import ContainerSpec, Mount


@dataclass(frozen=True)
class Option:
    """An option of `docker create`.

    Attributes:
        flag: its name in the command.
        key: its key in the body of the API's request, or in `HostConfig` there.
        request: the value under that key; None or nothing in it leaves the key out.
        words: what follows the flag, once for each; None where that is what the request says.
        of_host: whether the key is in `HostConfig`.
    """

    flag: str
    key: str
    request: Callable[[ContainerSpec], Any]
    words: Callable[[ContainerSpec], list[str]] | None = None
    of_host: bool = True

    def in_command(self, spec: ContainerSpec) -> list[str]:
        """Write the option as words of the command."""
        value = self.words(spec) if self.words else self.request(spec)
        if isinstance(value, bool):
            return [self.flag] if value else []
        values = value if isinstance(value, list) else [] if value is None else [value]
        return [word for text in values for word in (self.flag, str(text))]


OPTIONS = (
    Option("--network", "NetworkMode", lambda spec: spec.network_mode),
    # Only a run starts containers again, and only as one set.
    Option("--restart", "RestartPolicy", lambda _: {"Name": "no"}, lambda _: ["no"]),
    Option("--user", "User", lambda spec: spec.user, of_host=False),
    Option("--workdir", "WorkingDir", lambda spec: spec.working_dir, of_host=False),
    Option("--shm-size", "ShmSize", lambda spec: spec.shm_size),
    Option("--ipc", "IpcMode", lambda spec: spec.ipc_mode),
    Option("--stop-signal", "StopSignal", lambda spec: spec.stop_signal, of_host=False),
    Option("--stop-timeout", "StopTimeout", lambda spec: spec.stop_timeout, of_host=False),
    Option("--init", "Init", lambda spec: spec.init),
    Option("--tty", "Tty", lambda spec: spec.tty, of_host=False),
    Option("--privileged", "Privileged", lambda spec: spec.privileged),
    Option("--env", "Env", lambda spec: _pairs(spec.environment), of_host=False),
    Option(
        "--label",
        "Labels",
        lambda spec: dict(spec.labels),
        lambda spec: _pairs(spec.labels),
        of_host=False,
    ),
    # Mounts and not Binds: Binds silently create a source that does not exist.
    Option(
        "--mount",
        "Mounts",
        lambda spec: [_mount(mount) for mount in spec.mounts],
        lambda spec: [_mount_words(mount) for mount in spec.mounts],
    ),
    Option(
        "--device",
        "Devices",
        lambda spec: [_device(device) for device in spec.devices],
        lambda spec: list(spec.devices),
    ),
    Option(
        "--gpus",
        "DeviceRequests",
        lambda spec: [
            {"Driver": "", "Count": request.count, "Capabilities": [["gpu"]]}
            for request in spec.device_requests
        ],
        lambda spec: ["all" if r.count < 0 else str(r.count) for r in spec.device_requests],
    ),
    Option("--cap-add", "CapAdd", lambda spec: list(spec.cap_add)),
    Option(
        "--ulimit",
        "Ulimits",
        lambda spec: [
            {"Name": name, "Soft": limit, "Hard": limit} for name, limit in spec.ulimits.items()
        ],
        lambda spec: [f"{name}={limit}:{limit}" for name, limit in spec.ulimits.items()],
    ),
    Option(
        "--log-driver",
        "LogConfig",
        lambda spec: {"Type": "json-file", "Config": _log_options(spec)},
        lambda _: ["json-file"],
    ),
)
"""All but the name, the image, the entrypoint, its arguments, and `--log-opt`."""


def request(spec: ContainerSpec) -> dict[str, Any]:
    """Return the name and the exact body of the Engine API's create request."""
    config = {
        "Image": spec.image,
        "Cmd": list(spec.command),
        # An empty list would leave the image's entrypoint in place.
        "Entrypoint": None if spec.entrypoint is None else list(spec.entrypoint) or [""],
        **{option.key: option.request(spec) for option in OPTIONS if not option.of_host},
        "HostConfig": _given({o.key: o.request(spec) for o in OPTIONS if o.of_host}),
    }
    return {"name": spec.name, "config": _given(config)}


def command(spec: ContainerSpec) -> list[str]:
    """Write the `docker create …` that asks for the same."""
    words = ["docker", "create", "--name", spec.name]
    words += [word for option in OPTIONS for word in option.in_command(spec)]
    words += [word for pair in _pairs(_log_options(spec)) for word in ("--log-opt", pair)]
    if spec.entrypoint is not None:
        words += ["--entrypoint", spec.entrypoint[0] if spec.entrypoint else ""]
    # The command takes a single word as entrypoint; the others come before the arguments.
    return [*words, spec.image, *(spec.entrypoint or ())[1:], *spec.command]


def _log_options(spec: ContainerSpec) -> dict[str, str]:
    return {"max-size": spec.log_max_size, "max-file": str(spec.log_max_file)}


def _mount(mount: Mount) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": mount.source,
        "Target": mount.target,
        "ReadOnly": mount.read_only,
    }


def _mount_words(mount: Mount) -> str:
    words = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
    line = io.StringIO()
    # Docker reads the option as a line of CSV; unquoted, a comma in a path would begin an option.
    csv.writer(line).writerow([*words, *(["readonly"] if mount.read_only else [])])
    return line.getvalue().removesuffix("\r\n")


def _device(device: str) -> dict[str, str]:
    path, _, inside = device.partition(":")
    return {"PathOnHost": path, "PathInContainer": inside or path, "CgroupPermissions": "rwm"}


def _pairs(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, [], {})}
