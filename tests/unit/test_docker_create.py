"""An option of `docker run` reaches the Engine API, the printed command and the docs.

A field of ContainerSpec without an option fails here, and so does a new field that has no value
below, an option that the docs lack, and a key of the file that reaches no container.
"""

import csv
import re
from typing import Any

import pytest
from pydantic import BaseModel

from pd_deploy.config.models import ContainerOptions
from pd_deploy.hosts import docker_create
from pd_deploy.hosts.container_values import ContainerSpec, DeviceRequest, Mount
from tests.unit import example

PAGE = (example.ROOT / "docs/deployment-file.md").read_text()
OTHERS: dict[type[BaseModel], dict[str, Any]] = {
    ContainerSpec: {
        "name": "another",
        "image": "registry.example/another",
        "command": ("/start.sh", "--now"),
        "entrypoint": ("/bin/sh", "-c"),
        "environment": {"NAME": "value"},
        "mounts": (Mount(source="/a", target="/b"),),
        "devices": ("/dev/davinci0",),
        "device_requests": (DeviceRequest(count=2),),
        "privileged": True,
        "cap_add": ("IPC_LOCK",),
        "ulimits": {"memlock": -1},
        "shm_size": 1 << 30,
        "network_mode": "none",
        "ipc_mode": "host",
        "user": "1000",
        "working_dir": "/work",
        "init": False,
        "tty": True,
        "stop_signal": "SIGINT",
        "stop_timeout": 61,
        "labels": {"name": "value"},
        "log_max_size": "7m",
        "log_max_file": 7,
    },
    Mount: {"source": "/c", "target": "/d", "read_only": True},
    DeviceRequest: {"count": -1},
}
"""Another value than that of the container below, for each field."""

PLAIN = ContainerSpec(name="one", image="registry.example/one")
MOUNT, GPUS = Mount(source="/a", target="/b"), DeviceRequest(count=2)


def changed(model: type[BaseModel], field: str) -> tuple[ContainerSpec, ContainerSpec]:
    """Two containers that differ in one field alone."""
    update = {field: OTHERS[model][field]}
    if model is ContainerSpec:
        return PLAIN, PLAIN.model_copy(update=update)
    holder, inner = ("mounts", MOUNT) if model is Mount else ("device_requests", GPUS)
    two = (inner, inner.model_copy(update=update))
    before, after = (PLAIN.model_copy(update={holder: (one,)}) for one in two)
    return before, after


@pytest.mark.parametrize("model", OTHERS, ids=lambda model: model.__name__)
def test_every_field_has_another_value_here(model: type[BaseModel]) -> None:
    assert set(OTHERS[model]) == set(model.model_fields)


@pytest.mark.parametrize(
    ("model", "field"), [(model, field) for model, fields in OTHERS.items() for field in fields]
)
def test_every_field_reaches_the_api_and_the_command(model: type[BaseModel], field: str) -> None:
    before, after = changed(model, field)
    assert docker_create.request(before) != docker_create.request(after)
    assert docker_create.command(before) != docker_create.command(after)


def test_every_option_is_documented() -> None:
    every = PLAIN.model_copy(update=OTHERS[ContainerSpec] | {"init": True, "command": ()})
    flags = {word for word in docker_create.command(every)[2:] if word.startswith("--")}
    section = PAGE.partition("### Options of the containers")[2].partition("\nOn a host")[0]
    assert sorted(re.findall(r"^\| `(--[a-z-]+)` \|", section, re.MULTILINE)) == sorted(flags)


KEYS: dict[str, Any] = {
    "names": dict.fromkeys(("prefill", "decode", "proxy"), "another"),
    "privileged": True,
    "shm_size": "1g",
    "devices": ["/dev/another"],
    "mounts": ["/another"],
    "gpus": None,
    "cap_add": ["SYS_PTRACE"],
    "ulimits": {"nofile": 7},
    "time_zone": "Europe/Berlin",
    "stop_timeout": 61,
    "environment_file": "/etc/another.env",
}
"""Another value than that of the example for GPUs, for each key of `container`."""


def test_every_key_has_another_value_here() -> None:
    assert set(KEYS) == set(ContainerOptions.model_fields)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_file_reaches_the_command(key: str) -> None:
    path = example.ROOT / "deployments/vllm-gpu-3p1d.yaml"
    before, after = (
        docker_create.command(example.plan_of(path, changes).instance("p0").container)
        for changes in ({}, {"container": {key: KEYS[key]}})
    )
    generation = re.compile(r"1-[0-9a-f]{8}")
    assert generation.sub("", " ".join(before)) != generation.sub("", " ".join(after))


@pytest.mark.parametrize(
    "path", ["/data,readonly", '/a"b', '/"', "/ x", "/a,bind-propagation=shared", "/a\nb", "/ä"]
)
def test_a_path_is_one_field_of_a_mount_however_it_is_written(path: str) -> None:
    """Docker takes the fields of `--mount` apart as CSV."""
    spec = PLAIN.model_copy(update={"mounts": (Mount(source=path, target=f"{path}/in"),)})
    command = docker_create.command(spec)
    (fields,) = csv.reader([command[command.index("--mount") + 1]], strict=True)
    assert fields == ["type=bind", f"source={path}", f"target={path}/in"]
