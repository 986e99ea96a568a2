"""Pods over several hosts: names, ports, ranks, environment, and the scripts that join them."""

import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.cli.local_http import free_port
from pd_deploy.config.topology import Topology
from pd_deploy.engines.omniinfer import engine as omniinfer
from tests.unit import example

HOSTS = {name: f"10.0.0.{index}" for index, name in enumerate("abcdef", start=1)}
# The shape of an inventory that upstream was measured with: 2 prefills and decode, 2 hosts each.
WIDE: dict[str, Any] = {
    "profile": "deepseek-r1-a3-2p1d",
    "hosts": HOSTS,
    "prefill": {
        "p0": {"host": None, "hosts": ["a", "b"], "devices": "0-15"},
        "p1": {"host": None, "hosts": ["c", "d"], "devices": "0-15"},
        "p2": None,
    },
    "decode": {"d0": {"host": None, "hosts": ["e", "f"], "devices": "0-15"}},
}


@pytest.fixture(scope="module")
def wide() -> Topology:
    return example.place(WIDE)


def test_members_are_named_after_the_pod_and_share_its_ranks(wide: Topology) -> None:
    assert wide.names == ("p0-0", "p0-1", "p1-0", "p1-1", "d0-0", "d0-1", "c0")
    assert [i.kv_rank for i in wide.instances] == [0, 0, 1, 1, 2, 2]
    assert [i.node_rank for i in wide.instances] == [0, 1] * 3
    assert [i.tensor_parallel for i in wide.instances] == [32, 32, 32, 32, 1, 1]


def test_lists_are_those_measured_of_upstream_with_all_servers_of_decode(wide: Topology) -> None:
    golden = example.GOLDEN["edge_cases_measured"]["P of 2 nodes x2, D of 2 nodes"]
    service = example.for_engine(WIDE)
    prefill, decode = omniinfer.environment(service, "p0-0"), omniinfer.environment(service, "d0-1")
    servers = [server for pod in wide.prefill for server in pod.servers]
    assert ",".join(servers) == golden["PREFILL_API_SERVER_LIST"]
    assert int(prefill["PREFILL_POD_NUM"]) == golden["PREFILL_POD_NUM"]
    assert prefill["SERVER_IP_LIST"] == golden["DECODE_SERVER_IP_LIST"]
    assert prefill["NODE_IP_LIST"] == golden["NODE_IP_LIST@p0"]
    assert int(prefill["NNODES"]) == golden["NNODES@p0"]
    offsets = {
        f"d{member.node_rank}": member.server_offset * member.tensor_parallel
        for member in wide.decode[0].members
    }
    assert offsets == golden["DECODE_SERVER_OFFSET"]
    # Upstream lists one server of each; sixteen are started.
    assert wide.decode[0].servers[::16] == ("10.0.0.5:9100", "10.0.0.6:9101")
    assert len(set(wide.decode[0].servers)) == 32
    # Pods are counted as pods: upstream counts decode's instances.
    assert decode["DECODE_POD_NUM"] == "1"


def test_ports_are_those_each_member_listens_on(wide: Topology) -> None:
    ports = {i.name: set(i.ports.values()) for i in wide.instances}
    assert ports["p0-0"] == {9000, 8000, 5568, 6379}
    assert ports["p1-0"] == {9001, 8001, 5569, 6380}
    assert ports["p0-1"] == ports["p1-1"] == set()
    assert ports["d0-0"] == {8100, 5668, *range(9100, 9116)}
    assert ports["d0-1"] == {5669, *range(9101, 9117)}
    labels = {
        name: instance.container.labels["pd-deploy.ports"]
        for host in example.plan(WIDE).hosts.values()
        for name, instance in host.instances.items()
    }
    assert labels["p0-1"] == ""
    assert set(labels["d0-1"].split(",")) == {str(port) for port in ports["d0-1"]}


def test_the_master_is_first_whatever_its_address() -> None:
    """Then a prefill's hosts by address as text, as ray ranks them; decode's as in the file."""
    hosts = {"a": "10.0.0.9", "b": "10.0.0.20", "c": "10.0.0.1", "d": None, "e": None, "f": None}
    of = {"host": None, "hosts": ["a", "b", "c"]}
    placed = example.place(
        WIDE
        | {
            "hosts": hosts,
            "prefill": {"p0": of | {"devices": "8-15"}, "p1": None, "p2": None},
            "decode": {"d0": of | {"devices": "0-7"}},
        }
    )
    assert placed.prefill[0].addresses == ("10.0.0.9", "10.0.0.1", "10.0.0.20")
    assert placed.decode[0].addresses == ("10.0.0.9", "10.0.0.20", "10.0.0.1")


def test_decode_waits_for_prefills_over_hosts_and_prefills_on_one_host_for_decode() -> None:
    changes = WIDE | {
        "prefill": {
            "p0": {"host": None, "hosts": ["a", "b"], "devices": "0-7"},
            "p1": {"host": "c", "devices": "0-15"},
            "p2": None,
        }
    }
    of, placed = example.service(changes), example.place(changes)
    assert {name: omniinfer.starts_after(of, placed, name) for name in placed.names} == {
        "p0-0": (),
        "p0-1": (),
        "p1": ("d0-0", "d0-1"),
        "d0-0": ("p0-0", "p0-1"),
        "d0-1": ("p0-0", "p0-1"),
        "c0": (),
    }


@pytest.mark.parametrize(("unit", "offset"), [("servers", "4"), ("devices", "16")])
def test_offset_counts_what_the_launcher_counts(unit: str, offset: str) -> None:
    service = example.for_engine(
        WIDE
        | {
            "supports": {"server_offset": unit},
            "decode": {"d0": WIDE["decode"]["d0"] | {"tensor_parallel": 4}},
        }
    )
    argv = omniinfer.command(service, "d0-1")
    assert argv[argv.index("--server-offset") + 1] == offset
    assert argv[argv.index("--num-servers") + 1] == "4"
    assert argv[argv.index("--num-dp") + 1] == "8"


@pytest.mark.parametrize(("size", "offsets"), [(1, ["0", "16"]), (4, ["0", "16"])])
@pytest.mark.parametrize("unit", ["servers", "devices"])
def test_workers_of_several_copies_get_their_devices_by_an_offset(
    unit: str, size: int, offsets: list[str]
) -> None:
    """What upstream's worker makes of it are the host's devices, in order."""
    decode = WIDE["decode"]["d0"] | {"tensor_parallel": size}
    service = example.for_engine(
        WIDE | {"supports": {"server_offset": unit}, "decode": {"d0": decode}}
    )
    for member, offset in zip(service.topology.decode[0].members, offsets, strict=True):
        environment = omniinfer.environment(service, member.name)
        assert environment["SERVER_OFFSET"] == offset
        assert "ASCEND_RT_VISIBLE_DEVICES" not in environment
        found = [
            local_rank + (member.server_offset + server) * size - int(offset)
            for server in range(member.ranks)
            for local_rank in range(size)
        ]
        assert found == list(member.devices)
    for member in service.topology.prefill[0].members:
        environment = omniinfer.environment(service, member.name)
        assert environment["ASCEND_RT_VISIBLE_DEVICES"] == member.device_list
        assert "SERVER_OFFSET" not in environment


def test_copies_on_one_host_need_no_visible_devices_either_and_one_copy_does() -> None:
    of = {"profile": "deepseek-r1-a3-2p1d", "prefill": {"p2": None}}
    for size, copies in ((4, True), (8, False)):
        decode = {"d0": {"devices": "0-7", "tensor_parallel": size}}
        environment = omniinfer.environment(example.for_engine({**of, "decode": decode}), "d0")
        assert ("ASCEND_RT_VISIBLE_DEVICES" in environment) is not copies
        assert environment.get("SERVER_OFFSET") == ("0" if copies else None)


def test_members_that_ray_joins_have_the_address_that_ray_knows_them_by() -> None:
    service = example.for_engine(WIDE)
    for instance in service.topology.instances:
        environment = omniinfer.environment(service, instance.name)
        assert environment.get("VLLM_HOST_IP") == (instance.address if instance.uses_ray else None)
        if instance.uses_ray:
            script = omniinfer.start_script(service, instance.name)
            assert f"--node-ip-address={instance.address} " in script


RECORD = '#!/bin/bash\nprintf "%s\\n" "${0##*/} $*" >>"$SAID"\n'
# The second time it is asked, both nodes are there.
PYTHON = (
    RECORD
    + """\
case "$2" in *ray.init*) ;; *) exit 0 ;; esac
echo noise
[ $(grep -c "ray.init" "$SAID") -lt 2 ] || echo 2
"""
)


def prepared(tmp_path: Path, script: str, **programs: str) -> subprocess.Popen[bytes]:
    """Starts a start script with programs that note what they were given in tmp_path/said."""
    code = tmp_path / "omniinfer/tools/scripts"
    code.mkdir(parents=True)
    for name, text in programs.items():
        program = tmp_path / name
        program.write_text(text)
        program.chmod(0o755)
    script = script.replace("/workspace", str(tmp_path))
    environment = {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SAID": str(tmp_path / "said"),
    }
    (tmp_path / ".bashrc").touch()
    return subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE)


def test_a_prefills_master_serves_once_all_its_hosts_have_joined(tmp_path: Path) -> None:
    script = omniinfer.start_script(example.for_engine(WIDE), "p0-0")
    process = prepared(tmp_path, script, ray=RECORD, python=PYTHON)
    assert process.wait(30) == 0
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0] == "ray start --head --node-ip-address=10.0.0.1 --port=6379 --num-gpus=16"
    assert [line[:9] for line in said[1:3]] == ["python -c", "python -c"]
    last = said[-1]
    assert "start_api_servers.py --num-servers 1 " in last
    assert "--tp 32" in last
    assert "--distributed-executor-backend ray" in last


def test_another_host_joins_as_soon_as_the_master_listens(tmp_path: Path) -> None:
    port = free_port()
    script = omniinfer.start_script(example.for_engine(WIDE | {"ports": {"ray": port}}), "p0-1")
    script = script.replace("10.0.0.1", "127.0.0.1")
    process = prepared(tmp_path, script, ray=RECORD)
    assert process.stdout
    assert omniinfer.STARTED in process.stdout.readline().decode()
    assert not (tmp_path / "said").exists()
    with socket.create_server(("127.0.0.1", port)) as master:
        threading.Thread(target=master.accept, daemon=True).start()
        assert process.wait(30) == 0
    said = (tmp_path / "said").read_text().strip()
    address = f"--address=127.0.0.1:{port}"
    assert said == f"ray start {address} --node-ip-address=10.0.0.2 --num-gpus=16 --block"


def test_only_members_of_a_prefill_over_hosts_use_ray() -> None:
    service = example.for_engine(WIDE)
    assert "RAY_CGRAPH_get_timeout" in omniinfer.environment(service, "p0-1")
    assert "ray" not in omniinfer.start_script(service, "d0-0").replace("array", "")
    assert "ray start" not in omniinfer.start_script(example.for_engine(), "p0")
