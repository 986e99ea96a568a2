"""The `docker` command that a plan prints makes the container that a run makes.

Both spell each field of ContainerSpec by themselves: a field that one of them forgets fails here,
and so does a new field that has no value below.
"""

from typing import Any

import pytest
from pydantic import BaseModel

from pd_deploy.hosts.container_values import ContainerSpec, DeviceRequest, Mount, create_kwargs
from pd_deploy.planning import docker_command

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
def test_every_field_reaches_the_engine_and_the_command(model: type[BaseModel], field: str) -> None:
    before, after = changed(model, field)
    assert create_kwargs(before) != create_kwargs(after)
    assert docker_command.create(before) != docker_command.create(after)
