"""The `docker` command line that makes the same container as the Engine API does. Pure."""

from pd_deploy.hosts.container_values import ContainerSpec, Mount


def create(spec: ContainerSpec) -> list[str]:
    """`docker create …` with everything that the spec says."""
    return ["docker", "create", *_options(spec), spec.image, *_arguments(spec)]


def _options(spec: ContainerSpec) -> list[str]:
    options = ["--name", spec.name, "--network", spec.network_mode, "--restart", "no"]
    options += ["--log-driver", "json-file"]
    options += ["--log-opt", f"max-size={spec.log_max_size}"]
    options += ["--log-opt", f"max-file={spec.log_max_file}"]
    if spec.entrypoint is not None:
        options += ["--entrypoint", spec.entrypoint[0] if spec.entrypoint else ""]
    for flag, value in (
        ("--user", spec.user),
        ("--workdir", spec.working_dir),
        ("--shm-size", spec.shm_size),
        ("--ipc", spec.ipc_mode),
        ("--stop-signal", spec.stop_signal),
        ("--stop-timeout", spec.stop_timeout),
    ):
        options += [flag, str(value)] if value is not None else []
    for flag, wanted in (
        ("--init", spec.init),
        ("--tty", spec.tty),
        ("--privileged", spec.privileged),
    ):
        options += [flag] if wanted else []
    for flag, values in (
        ("--env", [f"{key}={value}" for key, value in spec.environment.items()]),
        ("--label", [f"{key}={value}" for key, value in spec.labels.items()]),
        ("--mount", [_mount(mount) for mount in spec.mounts]),
        ("--device", list(spec.devices)),
        ("--gpus", ["all" if r.count < 0 else str(r.count) for r in spec.device_requests]),
        ("--cap-add", list(spec.cap_add)),
        ("--ulimit", [f"{name}={limit}:{limit}" for name, limit in spec.ulimits.items()]),
    ):
        options += [word for value in values for word in (flag, value)]
    return options


def _arguments(spec: ContainerSpec) -> list[str]:
    return [*(spec.entrypoint or ())[1:], *spec.command]


def _mount(mount: Mount) -> str:
    mode = ",readonly" if mount.read_only else ""
    return f"type=bind,source={mount.source},target={mount.target}{mode}"
