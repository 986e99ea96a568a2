"""What would make a service fail is refused before anything stops, on hosts in memory."""

from pathlib import Path

import pytest

from pd_deploy.flows.deploy import deploy
from tests.memory.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def refused(world: World) -> str:
    """Why a run is refused; it changes no container."""
    before = {name: dict(machine.containers) for name, machine in world.machines.items()}
    outcome = world.run(deploy)
    assert outcome.error is not None
    assert {name: dict(machine.containers) for name, machine in world.machines.items()} == before
    return str(outcome.error)


def test_a_port_that_an_outbound_connection_may_get_is_warned_of(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.change(ports={"zmq": 36000})
    assert world.run(deploy).completed
    assert "ports 36000, 36001 lie in the kernel's ephemeral range" in caplog.text


def test_a_device_that_is_out_of_order(world: World) -> None:
    """Those with a warning work; those that no server needs don't matter."""
    a = world.machines["a"]
    a.health |= {3: "Alarm", 4: "Critical", 5: "Warning"}
    a.ports_down |= {3, 6}
    said = refused(world)
    assert "expected device 3 to be healthy, found that npu-smi says Alarm, its network" in said
    assert "device 4 to be healthy, found that npu-smi says Critical" in said
    assert "device 6 to be healthy, found that its network port is DOWN" in said
    assert "device 5" not in said
    a.health.clear()
    a.ports_down.clear()
    assert world.run(deploy).completed
    a.health |= {3: "Alarm"}
    assert "nothing to do" in world.run(deploy).message


def test_links_of_the_model_that_lead_out_of_the_mounts(world: World) -> None:
    """Those that stay within a mount don't matter."""
    a, model = world.machines["a"], "/data/models/QwQ-32B"
    a.links = {
        f"{model}/config.json": "/opt/hf/blobs/0123",
        f"{model}/gone": "",
        f"{model}/tokenizer.json": "/data/blobs/4567",
    }
    a.closed = [f"{model}/model.safetensors"]
    said = refused(world)
    assert f"found {model}/config.json → /opt/hf/blobs/0123, and 1 more" in said
    assert f"expected files that root can read, found {model}/model.safetensors" in said
    assert "tokenizer" not in said
    assert "→ mount /opt/hf/blobs at the same path" in said
    assert "root_squash" in said
    a.closed = []
    del a.links[f"{model}/gone"]
    for machine in world.machines.values():
        machine.disk.add_directory("/opt/hf")
    world.change(settings={"all": {"mounts": ["/opt/hf:/opt/hf:ro"]}})
    assert world.run(deploy).completed


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("name=userns", "expected Docker without userns-remap"),
        ("name=rootless", "expected Docker to run as root, found a rootless engine"),
    ],
)
def test_an_engine_whose_containers_are_cut_off_from_the_host(
    world: World, option: str, says: str
) -> None:
    world.machines["b"].security_options.append(option)
    assert f"host b (10.0.0.2): {says}" in refused(world)
    world.machines["b"].security_options.pop()
    assert world.run(deploy).completed
