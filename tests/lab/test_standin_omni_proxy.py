"""The stand-in's omni proxy: its arguments, and what its locations do through nginx."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pd_deploy.lab.standin.processes import Instance, StandinSet, standin_set
from tests.lab.proxies import OMNI_PROXY, conf_of, needs_nginx, run_proxy, set_age

LISTS = ["--prefill-endpoints", "10.0.0.1:9000", "--decode-endpoints", "10.0.0.2:9100"]
PROMPT = {"model": "qwen", "max_tokens": 5, "prompt": "5, 7, 9, 11,"}
SOURCE = "standin:requests_by_source_total"


NEWEST = "2026-07-24"


def run(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run_proxy(OMNI_PROXY, root, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*LISTS, "--prefill-servers-list", "10.0.0.1:9000"], "unknown option"),
        ([*LISTS, "--prefill-lb-sdk", "pd_score_balance"], "unknown option --prefill-lb-sdk"),
        ([*LISTS, "--listen-port", "80"], "--listen-port must be an integer from 1024 to 65500"),
        ([*LISTS, "--omni-proxy-pd-policy", "random"], "one of: sequential parallel aggregation"),
        ([*LISTS, "--omni-proxy-schedule-algo", "best"], "one of: default earliest_batch"),
        ([*LISTS, "--omni-proxy-decode-max-num-seqs", "0"], "must be a positive integer"),
        ([*LISTS, "--omni-proxy-max-batch-num-token", "many"], "must be a positive integer"),
        ([*LISTS, "--omni-proxy-model-path", "/nonexistent"], "/nonexistent is no directory"),
        ([*LISTS, "--decode-endpoints", "10.0.0.2:9100@0"], "must be host:port,host:port"),
        (LISTS[2:], "--prefill-endpoints is required"),
        (LISTS[:2], "--decode-endpoints is required"),
        (["--rollback"], "--rollback only with --stop"),
        (["--reload", *LISTS], "there is nothing to reload"),
    ],
)
def test_wrong_arguments_end_with_1(tmp_path: Path, args: list[str], message: str) -> None:
    set_age(tmp_path, NEWEST, "roles")
    done = run(tmp_path, "--dry-run", *args)
    assert done.returncode == 1
    assert message in done.stderr


OF_ROLES = {
    "--client-max-body-size": "20M",
    "--client-body-buffer-size": "2M",
    "--subrequest-output-buffer-size": "3M",
    "--omni-proxy-max-request-slots": "100",
}


@pytest.mark.parametrize("contract", ["v0", "v1", "roles"])
def test_roles_alone_knows_sizes_and_has_an_open_way_to_any_address(
    tmp_path: Path, contract: str
) -> None:
    set_age(tmp_path, NEWEST, contract)
    for option, value in OF_ROLES.items():
        done = run(tmp_path, "--dry-run", *LISTS, option, value)
        assert done.returncode == (0 if contract == "roles" else 1)
    assert run(tmp_path, "--dry-run", *LISTS).returncode == 0
    assert ("location ~ ^/proxy/" in conf_of(tmp_path)) == (contract == "roles")
    text = run(tmp_path, "--help").stdout
    assert all((option in text) == (contract == "roles") for option in OF_ROLES)


def test_a_dry_run_writes_what_it_was_told(tmp_path: Path) -> None:
    set_age(tmp_path, NEWEST, "roles")
    args = ["--listen-port", "7000", "--core-num", "2", "--no-reuseport"]
    args += ["--omni-proxy-prefill-max-num-seqs", "4", "--client-max-body-size", "20M"]
    assert run(tmp_path, "--dry-run", *LISTS, *args).returncode == 0
    conf = conf_of(tmp_path)
    for line in ("worker_processes 2;", "listen 7000;", "prefill = 4,", "decode = 32,"):
        assert f" {line}\n" in conf or conf.startswith(line) or f"\n{line}\n" in conf
    assert "client_max_body_size 20M;" in conf
    assert 'policy = "sequential",' in conf


@pytest.mark.parametrize(("built", "there"), [("2025-10-21", False), ("2025-10-22", True)])
def test_its_health_came_some_days_after_it(tmp_path: Path, built: str, there: bool) -> None:
    set_age(tmp_path, built)
    assert run(tmp_path, "--dry-run", *LISTS).returncode == 0
    assert ("location = /omni_proxy/health" in conf_of(tmp_path)) == there


@contextmanager
def served(
    root: Path, instances: StandinSet, *options: str, port_of: str = "d0"
) -> Iterator[Instance]:
    """A started set behind the omni proxy; the proxy as an instance to send requests to."""
    port = int(instances[port_of].args["--master-port"])
    args = ["--listen-port", str(port), "--core-num", "1"]
    for role in ("prefill", "decode"):
        names = [name for name in instances.instances if name.startswith(role[0])]
        servers = [f"{instances[name].host}:{instances[name].api_port}" for name in names]
        args += [f"--{role}-endpoints", ",".join(servers)]
    args += ["--log-file", str(root / "error.log"), "--access-log-file", str(root / "access.log")]
    done = run(root, *args, *options)
    assert done.returncode == 0, done.stderr
    try:
        yield replace(instances["d0"], name="c0", api_port=port, process=None)
    finally:
        run(root, "--stop")


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinSet]:
    """A running 2P1D set of the contract roles."""
    with standin_set(tmp_path_factory.mktemp("set"), prefills=2, contract="roles") as instances:
        instances.start()
        instances.wait_ready()
        yield instances


@pytest.fixture
def omni(root: Path) -> Path:
    """A root directory with what the omni proxy needs, of roles."""
    set_age(root, NEWEST, "roles")
    return root


def by_source(decode: Instance) -> list[float]:
    sources = ("external_kv_transfer", "local_compute")
    return [decode.metric(f'{SOURCE}{{source="{source}"}}') for source in sources]


@needs_nginx
@pytest.mark.parametrize(
    ("policy", "prefilled", "external"),
    [("sequential", 1, 1), ("parallel", 1, 0), ("aggregation", 0, 0)],
)
def test_the_policy_says_who_computes_the_prompt(
    omni: Path, instances: StandinSet, policy: str, prefilled: int, external: int
) -> None:
    prefill, decode = instances["p0"], instances["d0"]
    requests = 'standin:requests_total{status="200"}'
    assert prefill.request("/v1/completions", PROMPT).status == 200  # so that there is a counter
    before = prefill.metric(requests), by_source(decode)
    with served(omni, instances, "--omni-proxy-pd-policy", policy) as entry:
        answer = entry.request("/v1/completions", PROMPT)
    assert answer.body["choices"][0]["text"] == " 13, 15, 17"
    assert prefill.metric(requests) - before[0] == prefilled
    grown = [new - old for new, old in zip(by_source(decode), before[1], strict=True)]
    assert grown == [external, 1 - external]


@needs_nginx
def test_health_is_told_with_200_and_the_broadcast_fails_when_one_does(
    omni: Path, instances: StandinSet
) -> None:
    with served(omni, instances) as entry:
        for name, unhealthy, status in (("p1", False, 200), ("p1", True, 503)):
            instances[name].set_faults(unhealthy=unhealthy)
            answer = entry.request("/omni_proxy/health")
            assert answer.status == 200
            assert [item["healthy"] for item in answer.body["servers"]] == [
                True,
                not unhealthy,
                True,
            ]
            assert entry.request("/health").status == status
        instances["p1"].set_faults()
        assert "vllm:num_requests_running" in entry.request("/metrics").text
        counted = entry.request("/omni_proxy/metrics").text
        assert "omni_decode_running_requests{endpoint=" in counted
        assert 'omni_phase_waiting{phase="prefill"} 0' in counted


@needs_nginx
def test_models_are_decodes_and_the_pass_through_reaches_any_address(
    omni: Path, instances: StandinSet
) -> None:
    prefill = instances["p0"]
    instances["d0"].set_faults()
    with served(omni, instances) as entry:
        assert entry.request("/v1/models").body["data"][0]["id"] == "qwen"
        assert "GET /v1/models" not in prefill.log()
        answer = entry.request(f"/proxy/{prefill.host}:{prefill.api_port}/version")
        assert answer.body == {"version": "0.14.0+empty"}


@needs_nginx
@pytest.mark.parametrize(("built", "tokens"), [("2026-02-25", 5), ("2026-02-26", 1)])
def test_newer_ones_also_rewrite_max_completion_tokens_for_prefill(
    omni: Path, instances: StandinSet, built: str, tokens: int
) -> None:
    set_age(omni, built, "v1")
    prefill = instances["p0"]
    generated = 'vllm:generation_tokens_total{engine="0",model_name="qwen"}'
    chat = {
        "model": "qwen",
        "max_completion_tokens": 5,
        "messages": [{"role": "user", "content": "5, 7, 9, 11,"}],
    }
    assert prefill.request("/v1/completions", PROMPT).status == 200
    before = prefill.metric(generated)
    with served(omni, instances) as entry:
        assert entry.request("/v1/chat/completions", chat).status == 200
    assert prefill.metric(generated) - before == tokens


@needs_nginx
def test_a_reload_takes_new_servers_without_a_new_start(omni: Path, instances: StandinSet) -> None:
    pid = omni / "run/nginx.pid"
    with served(omni, instances) as entry:
        first = pid.read_text()
        decode = instances["d0"]
        args = ["--prefill-endpoints", f"{instances['p1'].host}:{instances['p1'].api_port}"]
        args += ["--decode-endpoints", f"{decode.host}:{decode.api_port}"]
        args += ["--listen-port", str(entry.api_port), "--core-num", "1"]
        args += ["--log-file", str(omni / "e.log"), "--access-log-file", str(omni / "a.log")]
        assert run(omni, "--reload", *args).returncode == 0
        assert pid.read_text() == first
        bad = run(omni, "--reload", *args, "--client-max-body-size", "wat")
        assert bad.returncode == 1
        assert "client_max_body_size wat" not in conf_of(omni)
