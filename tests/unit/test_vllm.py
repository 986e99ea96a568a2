"""The engine vllm: what containers and servers are given on CPUs, GPUs and NPUs."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pd_deploy import engines
from pd_deploy.cli import facts_file, show
from pd_deploy.config import yaml_files
from pd_deploy.config.load import load_deployment, parse_deployment
from pd_deploy.engines.vllm import Vllm
from pd_deploy.errors import InvalidInput
from pd_deploy.hosts import docker_create
from pd_deploy.planning import placement
from pd_deploy.planning.plans import Plan
from tests.unit import example

DEPLOYMENTS = example.ROOT / "deployments"
CPU = DEPLOYMENTS / "lab-vllm-3p1d.yaml"
GPU = DEPLOYMENTS / "vllm-gpu-3p1d.yaml"
ASCEND = DEPLOYMENTS / "vllm-ascend-2p1d.yaml"


def plan(file: Path, changes: dict[str, Any] | None = None) -> Plan:
    return example.plan_of(file, changes)


def runs(made: Plan, name: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of an instance."""
    command = made.instance(name).command
    return command.argv, command.environment


def value(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def kv_config(made: Plan, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(value(runs(made, name)[0], "--kv-transfer-config"))
    return config


def broken(file: Path, changes: dict[str, Any]) -> set[str]:
    """Names of the rules that a file with these changes breaks."""
    try:
        placement.build(
            parse_deployment(
                yaml_files.merge(yaml_files.read(file, names_file=("profile",)), changes)
            )
        )
    except InvalidInput as error:
        return {re.sub(r".*\(rule (.*)\)", r"\1", p.message) for p in error.problems}
    return set()


class TestAll:
    @pytest.mark.parametrize("file", [CPU, GPU, ASCEND], ids=lambda f: f.stem)
    def test_no_file_is_needed_but_the_start_scripts(self, file: Path) -> None:
        for host in plan(file).hosts.values():
            assert host.ranktables is None
            assert host.files == [plan.start_script for plan in host.instances.values()]

    @pytest.mark.parametrize("file", [CPU, GPU, ASCEND], ids=lambda f: f.stem)
    def test_no_instance_waits_for_another(self, file: Path) -> None:
        of = load_deployment(file)
        placed = placement.build(of)
        assert {Vllm().starts_after(of, placed, name) for name in placed.names} == {()}
        for pod in placed.pods:
            members = {member.name for member in pod.members}
            assert all(Vllm().restarts_with(of, placed, name) == members for name in members)

    def test_planning_offline_needs_no_device_address(self, tmp_path: Path) -> None:
        facts = tmp_path / "facts.json"
        facts.write_text('{"hosts": {"a": {"interface": "e0"}, "b": {"interface": "e1"}}}')
        made = facts_file.make_plan(load_deployment(GPU), facts)
        assert runs(made, "p0")[1]["NCCL_SOCKET_IFNAME"] == "e0"
        assert runs(made, "d0")[1]["NCCL_SOCKET_IFNAME"] == "e1"

    def test_arguments_and_environment_by_role_and_instance(self) -> None:
        changes = {
            "settings": {
                "all": {"environment": {"X": 1}},
                "decode": {"arguments": {"max-num-seqs": 7}, "gpu_memory_utilization": 0.5},
            },
            "prefill": {"p1": {"environment": {"X": 2}, "arguments": {"enforce-eager": False}}},
        }
        made = plan(GPU, changes)
        assert [runs(made, n)[1]["X"] for n in ("p0", "p1", "d0")] == ["1", "2", "1"]
        assert ["--enforce-eager" in runs(made, n)[0] for n in ("p0", "p1")] == [True, False]
        argv = runs(made, "d0")[0]
        assert value(argv, "--max-num-seqs") == "7"
        assert value(argv, "--gpu-memory-utilization") == "0.5"

    @pytest.mark.parametrize(
        ("file", "rule", "changes"),
        [
            (GPU, "engine-keys", {"proxy": {"c0": {"core_num": 2}}}),
            (GPU, "engine-keys", {"kv_parallel_size": 4}),
            (GPU, "engine-keys", {"decode_engine_id": 0}),
            (
                example.FILE,
                "engine-keys",
                {"vllm": {"device": "npu", "connector": "NixlConnector"}},
            ),
            (example.FILE, "engine-keys", {"engine": "vllm"}),
            (GPU, "tensor-parallel", {"decode": {"d0": {"tensor_parallel": 3}}}),
            (GPU, "tensor-parallel-ratio", {"prefill": {"p0": {"devices": "0-2"}}}),
            (GPU, "derived-arguments", {"settings": {"all": {"arguments": {"port": 1}}}}),
            (GPU, "derived-arguments", {"proxy": {"c0": {"arguments": {"policy": "random"}}}}),
            (
                GPU,
                "derived-environment",
                {"proxy": {"c0": {"environment": {"PYTHONUNBUFFERED": 0}}}},
            ),
            (
                GPU,
                "derived-environment",
                {"prefill": {"p0": {"environment": {"CUDA_VISIBLE_DEVICES": "0"}}}},
            ),
            (ASCEND, "ports-distinct", {"ports": {"zmq_step": 1}}),
            *(
                (ASCEND, "recompute-scheduler", {"settings": {"decode": settings}})
                for settings in (
                    {"additional_config": {"recompute_scheduler_enable": True}},
                    {
                        "additional_config": {
                            "scheduler_config": {"recompute_scheduler_enable": True}
                        }
                    },
                    {"arguments": {"recompute-scheduler-enable": True}},
                    {"arguments": {"recompute_scheduler_enable": "true"}},
                )
            ),
            (CPU, "multi-host-decode", {"decode": {"d0": {"host": None, "hosts": ["b", "a"]}}}),
        ],
    )
    def test_what_it_cannot_do_is_refused_by_a_rule(
        self, file: Path, rule: str, changes: dict[str, Any]
    ) -> None:
        assert rule in broken(file, changes)

    def test_a_scheduler_that_is_told_not_to_recompute_is_accepted(self) -> None:
        off = {"additional_config": {"recompute_scheduler_enable": False, "scheduler_config": {}}}
        assert broken(ASCEND, {"settings": {"decode": off}}) == set()

    def test_what_only_omniinfer_demands_is_no_rule_here(self) -> None:
        """Several decode pods, batches smaller than the model length, values with blanks."""
        changes = {
            "prefill": {"p2": None},
            "decode": {"d1": {"host": "b", "devices": "0-3"}},
            "settings": {"all": {"arguments": {"max-num-batched-tokens": 512, "x": "a b"}}},
        }
        assert broken(GPU, changes) == set()


class TestGpu:
    def test_server(self) -> None:
        argv, environment = runs(plan(GPU), "d0")
        assert argv[:3] == ["vllm", "serve", "/data/models/Llama-3.3-70B-Instruct"]
        assert value(argv, "--host") == "10.0.3.2"
        assert value(argv, "--port") == "9100"
        assert value(argv, "--tensor-parallel-size") == "4"
        assert "--data-parallel-size" not in argv
        assert environment == {
            "PYTHONUNBUFFERED": "1",
            "VLLM_HOST_IP": "10.0.3.2",
            "CUDA_VISIBLE_DEVICES": "4,5,6,7",
            "GLOO_SOCKET_IFNAME": example.INTERFACE,
            "NCCL_SOCKET_IFNAME": example.INTERFACE,
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.3.2",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": "7200",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "UCX_TLS": "all",
            "UCX_NET_DEVICES": "all",
            "NCCL_CUMEM_ENABLE": "1",
        }

    def test_kv_transfer_fails_rather_than_computes_again(self) -> None:
        made = plan(GPU)
        assert kv_config(made, "p0") == {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_producer",
            "kv_buffer_device": "cuda",
            "kv_load_failure_policy": "fail",
        }
        assert kv_config(made, "d0")["kv_role"] == "kv_consumer"

    def test_container_has_all_gpus_and_may_pin_memory(self) -> None:
        made = plan(GPU)
        spec = made.instance("d0").container
        host = docker_create.request(spec)["config"]["HostConfig"]
        assert host["DeviceRequests"] == [
            {"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}
        ]  # fmt: skip
        assert host["Ulimits"] == [{"Name": "memlock", "Soft": -1, "Hard": -1}]
        assert host["CapAdd"] == ["IPC_LOCK"]
        assert [d["PathOnHost"] for d in host["Devices"]] == ["/dev/infiniband"]
        assert host["Privileged"] is False
        line = " ".join(docker_create.command(spec))
        assert (
            "--device /dev/infiniband --gpus all --cap-add IPC_LOCK --ulimit memlock=-1:-1" in line
        )

    def test_router_needs_no_device(self) -> None:
        host = docker_create.request(plan(GPU).instance("c0").container)["config"]["HostConfig"]
        assert not {"DeviceRequests", "Devices", "CapAdd", "Ulimits"} & host.keys()

    def test_router_takes_the_files_arguments_and_each_only_once(self) -> None:
        changes = {
            "proxy": {
                "c0": {
                    "arguments": {"health_check_interval_secs": 9, "log-level": "debug"},
                    "environment": {"RUST_LOG": "info"},
                }
            }
        }
        argv, environment = runs(plan(GPU, changes), "c0")
        options = [word for word in argv if word.startswith("--")]
        assert value(argv, "--health-check-interval-secs") == "9"
        assert value(argv, "--log-level") == "debug"
        assert value(argv, "--health-failure-threshold") == "2"
        once = [word for word in options if word not in ("--prefill", "--decode")]
        assert len(set(once)) == len(once)
        assert environment == {"PYTHONUNBUFFERED": "1", "RUST_LOG": "info"}

    def test_router_has_every_server_and_shares_them_out(self) -> None:
        argv, _ = runs(plan(GPU), "c0")
        assert argv[0] == "/opt/router/bin/vllm-router"
        pairs = list(pairwise(argv))
        assert [url for option, url in pairs if option == "--prefill"] == [
            "http://10.0.3.1:9000", "http://10.0.3.1:9001", "http://10.0.3.2:9002",
        ]  # fmt: skip
        assert [url for option, url in pairs if option == "--decode"] == ["http://10.0.3.2:9100"]
        assert value(argv, "--policy") == "round_robin"

    def test_decode_over_two_hosts_is_data_parallel_behind_its_master(self) -> None:
        changes = {
            "prefill": {"p1": None, "p2": None},
            "decode": {
                "d0": {"host": None, "hosts": ["b", "a"], "devices": {"b": "0-7", "a": "4-7"},
                       "tensor_parallel": 2},
            },
            "allow": ["equal-devices"],
        }  # fmt: skip
        made = plan(GPU, changes)
        master, other = runs(made, "d0-0"), runs(made, "d0-1")
        for argv, _ in (master, other):
            assert value(argv, "--data-parallel-size") == "6"
            assert value(argv, "--data-parallel-address") == "10.0.3.2"
            assert value(argv, "--data-parallel-rpc-port") == "8100"
        assert value(master[0], "--data-parallel-size-local") == "4"
        assert value(other[0], "--data-parallel-size-local") == "2"
        assert "--headless" not in master[0]
        assert value(other[0], "--data-parallel-start-rank") == "4"
        # A rank adds its number in the pod to the port: these two begin at their own zmq ports.
        placed = placement.build(parse_deployment(yaml_files.merge(yaml_files.read(GPU), changes)))
        zmq = {i.name: i.kv_ports for i in placed.instances}
        port = "VLLM_NIXL_SIDE_CHANNEL_PORT"
        assert int(master[1][port]) == zmq["d0-0"][0]
        assert int(other[1][port]) + 4 == zmq["d0-1"][0]
        assert [len(zmq[name]) for name in ("d0-0", "d0-1")] == [4, 2]


class TestAscend:
    def test_server(self) -> None:
        argv, environment = runs(plan(ASCEND), "d0")
        assert value(argv, "--tensor-parallel-size") == "4"
        assert value(argv, "--data-parallel-size") == "4"
        assert environment["ASCEND_RT_VISIBLE_DEVICES"] == ",".join(map(str, range(16)))
        assert environment["HCCL_IF_IP"] == "10.0.4.2"
        assert environment["HCCL_SOCKET_IFNAME"] == example.INTERFACE
        assert "VLLM_NIXL_SIDE_CHANNEL_PORT" not in environment

    def test_mooncake_knows_both_sides_and_has_a_port_per_device(self) -> None:
        made = plan(ASCEND)
        assert kv_config(made, "p1") == {
            "kv_connector": "MooncakeConnectorV1",
            "kv_role": "kv_producer",
            "kv_buffer_device": "npu",
            "kv_port": "36016",
            "kv_connector_extra_config": {
                "prefill": {"dp_size": 1, "tp_size": 8},
                "decode": {"dp_size": 4, "tp_size": 4},
            },
        }
        ports = made.instance("d0").container.labels["pd-deploy.ports"].split(",")
        assert ports == ["9100", "8100", *map(str, range(37600, 37616))]

    def test_a_connector_for_hybrid_models_is_set_up_alike(self) -> None:
        hybrid = {"vllm": {"connector": "MooncakeHybridConnector"}}
        made = plan(ASCEND, hybrid)
        assert kv_config(made, "d0") == kv_config(plan(ASCEND), "d0") | {
            "kv_connector": "MooncakeHybridConnector"
        }
        assert runs(made, "d0")[1] == runs(plan(ASCEND), "d0")[1]
        assert made.instance("d0").ports == plan(ASCEND).instance("d0").ports

    def test_the_routers_metrics_port_is_one_of_its_ports(self) -> None:
        assert plan(GPU).instance("c0").ports == {7000, 29000}
        assert "ports-distinct" in broken(GPU, {"vllm": {"router_metrics_port": 7000}})
        api = min(plan(GPU).instance("p0").ports)
        assert "ports-distinct" in broken(GPU, {"ports": {"api": 29000}}), api

    def test_container_has_its_own_npus_only(self) -> None:
        spec = plan(ASCEND).instance("p1").container
        assert spec.devices == (
            "/dev/davinci_manager", "/dev/hisi_hdc", "/dev/devmm_svm",
            *(f"/dev/davinci{d}" for d in range(8, 16)),
        )  # fmt: skip
        assert not spec.privileged
        assert not spec.device_requests
        assert {m.source for m in spec.mounts if m.read_only} >= {
            "/usr/local/Ascend/driver", "/usr/local/dcmi", "/etc/hccn.conf",
        }  # fmt: skip


class TestCpu:
    def test_a_rank_has_the_core_that_stands_for_it(self) -> None:
        bound = {"settings": {"all": {"environment": {"VLLM_CPU_OMP_THREADS_BIND": None}}}}
        changes = yaml_files.merge(bound, {"decode": {"d0": {"devices": "1-2"}}})
        made = plan(CPU, changes)
        assert runs(made, "p0")[1]["VLLM_CPU_OMP_THREADS_BIND"] == "0"
        assert runs(made, "d0")[1]["VLLM_CPU_OMP_THREADS_BIND"] == "1|2"

    def test_kv_goes_over_the_hosts_own_interface(self) -> None:
        _, environment = runs(plan(CPU), "p0")
        assert environment["UCX_TLS"] == "tcp"
        assert environment["UCX_NET_DEVICES"] == example.INTERFACE
        assert kv_config(plan(CPU), "p0")["kv_buffer_device"] == "cpu"


def test_the_flow_reads_device_addresses_only_where_the_engine_says_how() -> None:
    assert engines.get("vllm").read_addresses_command(example.service(), [0, 1]) == []
    assert engines.get("omniinfer").read_addresses_command(example.service(), [0, 1])


def test_the_plan_for_people_shows_gpus() -> None:
    assert "device_requests:\n     count=-1" in show.plan(plan(GPU))
