"""The engine sglang: what containers, servers and the router are given on GPUs and NPUs."""

import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.config import yaml_files
from pd_deploy.config.load import load_deployment, parse_deployment
from pd_deploy.engines import sglang_in_image
from pd_deploy.engines.base import PROVING_ADDRESS
from pd_deploy.engines.sglang import Sglang
from pd_deploy.lab import sglang as lab
from pd_deploy.planning import placement
from pd_deploy.steps.verify import metrics
from tests.memory import answers
from tests.memory import sglang as sglang_in_memory
from tests.unit import example
from tests.unit.test_vllm import broken, plan, runs, value

GPU = example.ROOT / "deployments/sglang-gpu-2p1d.yaml"
ASCEND = example.ROOT / "deployments/sglang-ascend-2p1d.yaml"


def test_a_prefill_says_where_its_peers_meet_and_a_decode_does_not() -> None:
    made = plan(GPU)
    argv, environment = runs(made, "p1")
    assert argv[:3] == ["python3", "-m", "sglang.launch_server"]
    assert dict(pairwise(argv)) | {
        "--model-path": "/data/models/Llama-3.3-70B-Instruct",
        "--served-model-name": "llama",
        "--host": "10.0.5.1",
        "--port": "30001",
        "--context-length": "32768",
        "--device": "cuda",
        "--tp-size": "4",
        "--disaggregation-mode": "prefill",
        "--disaggregation-transfer-backend": "mooncake",
        "--disaggregation-ib-device": "mlx5_0,mlx5_1",
        "--disaggregation-bootstrap-port": "9014",
        "--mem-fraction-static": "0.85",
        "--chunked-prefill-size": "8192",
    } == dict(pairwise(argv))
    assert "--enable-metrics" in argv
    assert not {"--dp-size", "--dist-init-addr", "--nnodes"} & set(argv)
    assert environment == {
        "PYTHONUNBUFFERED": "1",
        "SGLANG_HOST_IP": "10.0.5.1",
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "GLOO_SOCKET_IFNAME": example.INTERFACE,
        "NCCL_SOCKET_IFNAME": example.INTERFACE,
        "HF_HUB_OFFLINE": "1",
        "NCCL_CUMEM_ENABLE": "1",
    }
    of_decode = runs(made, "d0")[0]
    assert value(of_decode, "--disaggregation-mode") == "decode"
    assert "--disaggregation-bootstrap-port" not in of_decode


def test_the_router_has_each_prefill_with_its_bootstrap_port() -> None:
    argv = runs(plan(GPU), "c0")[0]
    assert argv[:3] == ["python3", "-m", "sglang_router.launch_router"]
    assert [argv[i + 1 : i + 3] for i, word in enumerate(argv) if word == "--prefill"] == [
        ["http://10.0.5.1:30000", "8998"],
        ["http://10.0.5.1:30001", "9014"],
    ]
    assert value(argv, "--decode") == "http://10.0.5.2:30100"
    assert value(argv, "--policy") == "round_robin"
    assert "--pd-disaggregation" in argv


def test_the_router_opens_once_it_knows_every_server() -> None:
    script = plan(GPU).instance("c0").start_script.content
    assert '"healthy_workers": ?3[,}]' in script
    assert f"until_ready {PROVING_ADDRESS}" in script
    assert "until_ready 10.0.5.1" in script


def test_a_pod_over_two_hosts_is_one_engine_that_meets_at_its_master() -> None:
    made = plan(ASCEND)
    master, other = runs(made, "d0-0")[0], runs(made, "d0-1")[0]
    for rank, argv in enumerate((master, other)):
        assert value(argv, "--tp-size") == "32"
        assert value(argv, "--dist-init-addr") == "10.0.6.3:10600"
        assert (value(argv, "--nnodes"), value(argv, "--node-rank")) == ("2", str(rank))
    # The other host's port only says that it is well: nobody is sent there.
    assert value(other, "--port") == "10614"
    assert made.instance("d0-1").ports == {10614}
    assert [word for word in runs(made, "c0")[0] if word.startswith("http://10.0.6.4")] == []
    at = argv.index("--cuda-graph-bs-decode")
    assert argv[at + 1 : at + 9] == ["12", "14", "16", "18", "20", "22", "24", "26"]


def test_a_prefill_over_hosts_has_no_port_of_ray() -> None:
    changes = {"prefill": {"p0": {"host": None, "hosts": ["a", "b"]}, "p1": None}}
    made = plan(ASCEND, changes)
    assert value(runs(made, "p0-1")[0], "--disaggregation-bootstrap-port") == "8998"
    assert 6379 not in made.instance("p0-0").ports
    assert "ports-distinct" not in broken(ASCEND, changes)


def test_ascends_store_is_at_the_first_prefill_for_all() -> None:
    made = plan(ASCEND)
    stores = {runs(made, name)[1]["ASCEND_MF_STORE_URL"] for name in ("p0", "p1", "d0-0", "d0-1")}
    assert stores == {"tcp://10.0.6.1:8999"}
    assert 8999 in made.instance("p0").ports
    environment = runs(made, "p1")[1]
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == ",".join(map(str, range(16)))
    assert environment["HCCL_SOCKET_IFNAME"] == example.INTERFACE
    assert "ASCEND_MF_STORE_URL" not in runs(plan(GPU), "p0")[1]
    assert made.instance("p1").container.devices[-1] == "/dev/davinci15"


@pytest.mark.parametrize(
    "attention", [{"enable-dp-attention": True, "dp-size": 4}, {"attn_dp_size": 4}]
)
def test_attentions_data_parallelism_takes_ports_that_no_other_pod_has(
    attention: dict[str, Any],
) -> None:
    """By itself it would take seven from its API port + 233 on, and the next pod's the same."""
    made = plan(GPU, {"settings": {"prefill": {"arguments": attention}}})
    for name, port in (("p0", 9000), ("p1", 9016)):
        argv = runs(made, name)[0]
        assert value(argv, "--dist-init-addr") == f"10.0.5.1:{port}"
        assert {port + i for i in range(7)} <= made.instance(name).ports
        assert [value(argv, word) for word in argv if word.endswith("dp-size")] == ["4"]


def test_a_server_of_the_latest_version_takes_every_option_of_the_examples() -> None:
    """By the table of the stand-in, which was made from the real parser."""
    parser = sglang_in_memory.parser()
    for file in (GPU, ASCEND, example.ROOT / "deployments/lab-sglang-2p1d.yaml"):
        made = plan(file)
        for name in (name for host in made.hosts.values() for name in host.instances):
            if name != "c0":
                parser.parse_args(runs(made, name)[0][3:])
    with pytest.raises(SystemExit):
        parser.parse_args(["--model-path", "/x", "--disaggregation-decode-tp", "8"])


def test_fewer_devices_per_copy_make_several_copies() -> None:
    argv = runs(plan(GPU, {"decode": {"d0": {"tensor_parallel": 4}}}), "d0")[0]
    assert (value(argv, "--tp-size"), value(argv, "--dp-size")) == ("4", "2")


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("engine-keys", {"vllm": {"device": "cuda", "connector": "NixlConnector"}}),
        ("engine-keys", {"sglang": None, "profile": "vllm-gpu", "engine": "sglang"}),
        ("engine-keys", {"settings": {"all": {"additional_config": {"x": 1}}}}),
        ("engine-keys", {"prefill": {"p0": {"ports": {"master": 9}}}}),
        ("tensor-parallel", {"decode": {"d0": {"tensor_parallel": 3}}}),
        (
            "tensor-parallel",
            {"decode": {"d0": {"tensor_parallel": 4, "arguments": {"enable-dp-attention": True}}}},
        ),
        ("tensor-parallel", {"decode": {"d0": {"arguments": {"pp_size": 2}}}}),
        ("tensor-parallel-ratio", {"prefill": {"p0": {"devices": "0-2"}}}),
        ("derived-arguments", {"settings": {"all": {"arguments": {"dp-size": 2}}}}),
        ("derived-arguments", {"settings": {"all": {"arguments": {"tp_size": 2}}}}),
        ("derived-arguments", {"proxy": {"c0": {"arguments": {"prefill": "x"}}}}),
        ("derived-environment", {"settings": {"all": {"environment": {"SGLANG_HOST_IP": "x"}}}}),
        ("kv-layout", {"settings": {"decode": {"arguments": {"page-size": 64}}}}),
        ("kv-layout", {"prefill": {"p1": {"arguments": {"kv_cache_dtype": "fp8_e5m2"}}}}),
        ("transfer-backend", {"sglang": {"transfer_backend": "ascend"}}),
        ("ports-distinct", {"ports": {"zmq_step": 4}}),
    ],
)
def test_what_does_not_fit_is_refused_by_a_rule(rule: str, changes: dict[str, Any]) -> None:
    assert rule in broken(GPU, changes)


def test_what_fits_is_accepted() -> None:
    both = {"arguments": {"page-size": 64, "kv-cache-dtype": "fp8_e5m2"}}
    stages = {"arguments": {"pp-size": 2}, "tensor_parallel": 4}
    assert broken(GPU, {"settings": {"all": both}, "decode": {"d0": stages}}) == set()
    assert "--dp-size" not in runs(plan(GPU, {"decode": {"d0": stages}}), "d0")[0]


def test_prefill_and_decode_are_asked_to_meet_in_one_room() -> None:
    of = placement.build(load_deployment(GPU))
    asked = Sglang().prefill_request(
        of.prefill[1].master, {"prompt": "x"}, "ffffffff-ffff-4fff-bfff-ffffffffffff"
    )
    assert asked.pop("bootstrap_room") < 1 << 63
    assert asked == {"prompt": "x", "bootstrap_host": "10.0.5.1", "bootstrap_port": 9014}
    assert Sglang().decode_request(asked, {}) == asked


def test_what_was_moved_is_counted_in_bytes() -> None:
    page = metrics.parse('sglang:kv_transfer_total_mb_sum{tp_rank="0"} 0.5\n')
    assert metrics.total([page], Sglang.COUNTERS.kv_bytes) == 512 * 1024


BY_CALLS = """
class ServerArgs:
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model", type=str, help="not --one")
        parser.add_argument("--dp-size", type=int)
"""
BY_FIELDS = """
class Parallel:
    attn_dp_size: A[int, Arg(help="x", aliases=["--attention-dp"])] = 1
    rank: int = 0
"""


def test_an_images_options_are_read_from_its_sources_of_either_form(tmp_path: Path) -> None:
    """Nothing of SGLang is imported, as it needs devices."""
    fields = tmp_path / "srt/arg_groups/fields"
    fields.mkdir(parents=True)
    (tmp_path / "srt/server_args.py").write_text(BY_CALLS)
    (fields / "parallel.py").write_text(BY_FIELDS)
    (fields / "broken.py").write_text("def (")
    assert sglang_in_image.look(tmp_path)["flags"] == {
        "sglang.launch_server": [
            "--attention-dp", "--attn-dp-size", "--dp-size", "--model", "--model-path",
        ]
    }  # fmt: skip
    assert sglang_in_image.look(None)["flags"] == {}


def test_the_standins_image_says_what_its_parser_takes(tmp_path: Path) -> None:
    """By the command that a container of it runs."""
    for path, content in lab.sources().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    asked = subprocess.run(
        Sglang().probe_command(), env=environment, capture_output=True, text=True, check=True
    )
    assert Sglang().parse_probe(asked.stdout) == Sglang().parse_probe(answers.sglang())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"decode": {"arguments": {"attn-dp-size": 2, "page_size": 64}}}}, set()),
        ({"settings": {"decode": {"arguments": {"no-such": 1, "nor_this": True}}}},
         {"decode.d0.arguments.no-such", "decode.d0.arguments.nor-this"}),
        ({"settings": {"decode": {"arguments": {"no-such": False}}}}, set()),
        ({"settings": {"decode": {"arguments": {"cuda-graph-bs-dec": "8"}}}}, set()),
        ({"settings": {"decode": {"arguments": {"no-enable-tf32-matmul": True}}}}, set()),
        ({"settings": {"decode": {"arguments": {"no-such": 1}}},
          "sglang": {"command": "/opt/python -m sglang.launch_server"}}, set()),
        ({"settings": {"decode": {"arguments": {"no-such": 1}}},
          "code": {"source": "/x", "path": "/opt/sglang"}}, set()),
    ],
    ids=["known", "unknown", "left out", "a beginning", "no-", "another Python", "own code"],
)  # fmt: skip
def test_options_that_the_image_does_not_take_are_named(
    changes: dict[str, Any], named: set[str]
) -> None:
    facts = Sglang().parse_probe(answers.sglang())
    of = parse_deployment(yaml_files.merge(yaml_files.read(GPU), changes))
    findings = list(Sglang().image_findings(of, placement.derive(of), facts))
    assert {rule for rule, _ in findings} <= {"image-options"}
    assert {problem.key for _, problem in findings} == named
    assert list(Sglang().image_findings(of, placement.derive(of), None)) == []
