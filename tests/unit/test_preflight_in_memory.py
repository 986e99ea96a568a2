"""What would make a service fail is refused before anything stops, on hosts in memory."""

from pathlib import Path

import pytest

from pd_deploy.flows.deploy import deploy
from tests.memory.world import MODEL, World


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
    b = world.machines["b"]
    b.driver, b.clock_ahead, b.mtu = "25.2.0", 90, 9000
    b.files["/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"] = "cppc_cpufreq\n"
    b.files["/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"] = "powersave\n"
    world.machines["a"].hccn[3, "tls"] = "hccn_tool: not found"
    world.deploy()
    assert "ports 36000, 36001 lie in the kernel's ephemeral range" in caplog.text
    for told in (
        "b (10.0.0.2): expected driver 24.1.rc3.5, as on a (10.0.0.1), found 25.2.0",
        "b (10.0.0.2): expected an MTU of 1500, as on a (10.0.0.1), found 9000",
        "b (10.0.0.2): expected processors that go faster under load, found the governor powersave",
        "expected its clock to be as the others', found it 90 s",
        "-tls -g` printed 'hccn_tool: not found' for device 3",
    ):
        assert told in caplog.text


def test_hosts_that_differ_or_do_not_reach_each_other(world: World) -> None:
    """All of it is told at once; a file may allow what its owner knows better."""
    a, b = world.machines["a"], world.machines["b"]
    b.hccn[3, "tls"] = "dev_id:3, tls switch[1](0:disable, 1:enable)\n"
    b.disk.put(f"{MODEL}/config.json", b"[]", 0o644)
    b.disk.put(f"{MODEL}/README.md", b"another", 0o644)
    b.closed_to.add(a.address)
    said = refused(world)
    assert "b (10.0.0.2): expected the TLS switch of all devices to be the same, 0 as on" in said
    assert "found the other on device 3" in said
    assert "as on a (10.0.0.1), found config.json with another content →" in said
    assert "a (10.0.0.1): expected to reach b (10.0.0.2) at its ports" in said
    assert "nothing comes back" in said
    assert "expected to reach a (10.0.0.1)" not in said
    world.change(allow=["device-tls", "model-files", "ports-reachable"])
    world.deploy()


def test_ports_that_serve_are_not_tried_again(world: World) -> None:
    world.deploy()
    world.machines["b"].closed_to.add(world.machines["a"].address)
    outcome = world.run(deploy, image=world.push("20250725_1"))
    assert outcome.completed, outcome.error
    assert not [m for m in outcome.moments if m.what == "reach"]


def test_a_device_that_is_out_of_order(world: World) -> None:
    """Those with a warning work; those that no server needs don't matter."""
    a = world.machines["a"]
    a.health |= {3: "Alarm", 4: "Critical", 5: "Warning"}
    a.ports_down |= {3, 6}
    said = refused(world)
    assert "expected device 3 to be healthy, found that npu-smi says Alarm, its network" in said
    assert "device 4 to be healthy, found that npu-smi says Critical" in said
    assert "device 6 to be healthy, found that its network port is DOWN" in said
    assert "device 5" not in said  # that is a warning
    a.health.clear()
    a.ports_down.clear()
    world.deploy()
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
    assert (
        f"expected files and directories that root can read, found {model}/model.safetensors"
        in said
    )
    assert "tokenizer" not in said
    assert "→ mount /opt/hf/blobs at the same path" in said
    assert "root_squash" in said
    a.closed = []
    del a.links[f"{model}/gone"]
    for machine in world.machines.values():
        machine.disk.add_directory("/opt/hf")
    world.change(settings={"all": {"mounts": ["/opt/hf:/opt/hf:ro"]}})
    world.deploy()


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
    world.deploy()
