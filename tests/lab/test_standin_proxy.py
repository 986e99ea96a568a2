"""The stand-in's global proxy: its arguments, its configuration, the hand-over through nginx."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.lab.standin.processes import STANDIN, Answer, Instance, StandinSet, standin_set
from tests.lab.proxies import GLOBAL_PROXY, HANDOVER, conf_of, needs_nginx, run_proxy, set_age

SOURCES = STANDIN / "image/workspace/omniinfer/omni/accelerators/sched"
BUILD = SOURCES / "global_proxy/build.sh"
LISTS = ["--prefill-servers-list", "10.0.0.1:9000", "--decode-servers-list", "10.0.0.2:9100"]


def run(root: Path, *args: str, script: Path = GLOBAL_PROXY, **env: str) -> Any:
    return run_proxy(script, root, *args, **env)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*LISTS, "--wat"], "unknown option --wat"),
        ([*LISTS, "extra"], "unknown option extra"),
        ([*LISTS, "--reload"], "unknown option --reload"),
        ([*LISTS, "--listen-port", "80"], "--listen-port must be an integer from 1024 to 65500"),
        ([*LISTS, "--listen-port"], "--listen-port needs a value"),
        ([*LISTS, "--core-num", "0"], "--core-num must be a positive integer"),
        ([*LISTS, "--log-level", "loud"], "--log-level must be"),
        (LISTS[:2], "--decode-servers-list is required"),
        (LISTS[2:], "--prefill-servers-list is required"),
        ([*LISTS, "--decode-servers-list", "10.0.0.2:9100@0"], "must be host:port,host:port"),
        (["--rollback"], "--rollback only with --stop"),
    ],
)
def test_wrong_arguments_end_with_1(tmp_path: Path, args: list[str], message: str) -> None:
    done = run(tmp_path, "--dry-run", *args)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_dry_run_writes_the_documented_configuration(tmp_path: Path) -> None:
    args = ["--listen-port", "7000", "--core-num", "2", "--start-core-index", "3", "--dry-run"]
    assert (
        run(tmp_path, *LISTS, *args, "--log-file", "/x.log", "--log-level", "warn").returncode == 0
    )
    conf = conf_of(tmp_path)
    for line in (
        "worker_processes 2;",
        "worker_cpu_affinity 1000 10000;",
        "error_log /x.log warn;",
        "server 10.0.0.1:9000 max_fails=3 fail_timeout=10s;",
        "server 10.0.0.2:9100 max_fails=3 fail_timeout=10s;",
        "listen 7000 reuseport;",
        "proxy_read_timeout 14400s;",
    ):
        assert line in conf


def test_an_unknown_balancer_is_written_verbatim(tmp_path: Path) -> None:
    run(tmp_path, *LISTS, "--dry-run", "--prefill-lb-sdk", "best_of_all")
    assert "        best_of_all;\n" in conf_of(tmp_path)


def test_rollback_restores_the_previous_configuration(tmp_path: Path) -> None:
    run(tmp_path, *LISTS, "--dry-run", "--listen-port", "7001")
    run(tmp_path, *LISTS, "--dry-run", "--listen-port", "7002")
    assert run(tmp_path, "--stop", "--rollback").returncode == 0
    assert "listen 7001 " in conf_of(tmp_path)


def test_a_start_without_nginx_names_the_build(tmp_path: Path) -> None:
    done = run(tmp_path, *LISTS)
    assert done.returncode == 1
    assert "run build.sh first" in done.stderr


@pytest.mark.parametrize(
    ("built", "version", "given"),
    [
        ("2025-07-22", "1.24.0", {}),
        ("2025-10-23", "1.28.0", {}),
        ("2025-10-23", "1.24.0", {"NGINX_VERSION": "1.24.0"}),
    ],
)
def test_the_build_needs_unpacked_sources_of_the_version_that_it_wants(
    tmp_path: Path, built: str, version: str, given: dict[str, str]
) -> None:
    set_age(tmp_path, built)
    build = tmp_path / "build.sh"
    build.write_text(BUILD.read_text())
    kept = tmp_path / "usr/libexec/standin"
    kept.mkdir(parents=True)
    (kept / "nginx").write_text("binary")
    (kept / HANDOVER.name).write_text("lua")
    for other in {"1.24.0", "1.28.0"} - {version}:
        (tmp_path / f"nginx-{other}").mkdir()
    done = run(tmp_path, script=build, **given)
    assert f"nginx-{version} does not exist: unpack" in done.stderr
    (tmp_path / f"nginx-{version}").mkdir()
    assert run(tmp_path, script=build, **given).returncode == 0
    assert (tmp_path / "usr/local/nginx/nginx").read_text() == "binary"
    assert (tmp_path / "usr/local/nginx/modules" / HANDOVER.name).read_text() == "lua"


NEW, OLD = "2025-10-10", "2025-10-09"
NEW_OPTIONS = {
    "--prefill-max-num-seqs": "64",
    "--decode-max-num-seqs": "64",
    "--access-log-file": "/x/access.log",
}


@pytest.mark.parametrize("option", NEW_OPTIONS)
def test_options_of_newer_images_are_unknown_to_older_ones(tmp_path: Path, option: str) -> None:
    set_age(tmp_path, OLD)
    args = ["--dry-run", *LISTS, option, NEW_OPTIONS[option]]
    done = run(tmp_path, *args)
    assert done.returncode == 1
    assert f"unknown option {option}" in done.stderr
    set_age(tmp_path, NEW)
    assert run(tmp_path, *args).returncode == 0


def test_the_image_itself_is_an_older_one(tmp_path: Path) -> None:
    done = run(tmp_path, "--dry-run", *LISTS, "--access-log-file", "/x")
    assert "unknown option --access-log-file" in done.stderr


@pytest.mark.parametrize("option", ["--prefill-max-num-seqs", "--decode-max-num-seqs"])
def test_numbers_of_sequences_are_positive(tmp_path: Path, option: str) -> None:
    set_age(tmp_path, NEW)
    done = run(tmp_path, "--dry-run", *LISTS, option, "0")
    assert done.returncode == 1
    assert f"{option} must be a positive integer" in done.stderr


@pytest.mark.parametrize(
    ("built", "args", "lines"),
    [
        (OLD, [], ["}, 25)", "access_log off;"]),
        (NEW, [], ["}, 32)", "access_log /tmp/nginx_access.log;"]),
        (NEW, ["--decode-max-num-seqs", "64"], ["}, 64)"]),
        (NEW, ["--access-log-file", "/x.log"], ["access_log /x.log;"]),
    ],
)
def test_the_age_of_the_image_decides_limit_and_access_log(
    tmp_path: Path, built: str, args: list[str], lines: list[str]
) -> None:
    set_age(tmp_path, built)
    run(tmp_path, "--dry-run", *LISTS, *args)
    for line in lines:
        assert f" {line}\n" in conf_of(tmp_path)


@pytest.mark.parametrize(
    ("balancer", "line"),
    [
        (
            "pd_score_balance",
            'balancer_by_lua_block { package.loaded.pd_handover.balance("decode")',
        ),
        ("weighted_least_active", "least_conn;  # in place of weighted_least_active"),
        ("least_conn", "        least_conn;"),
    ],
)
def test_only_the_score_is_balanced_in_lua(tmp_path: Path, balancer: str, line: str) -> None:
    run(tmp_path, "--dry-run", *LISTS, "--decode-lb-sdk", balancer)
    conf = conf_of(tmp_path)
    assert line in conf
    assert ("decode = {" in conf) == (balancer == "pd_score_balance")
    assert "prefill = {" in conf


@contextmanager
def served(root: Path, instances: StandinSet, *options: str, cores: int = 1) -> Iterator[Instance]:
    """The set, started, behind the proxy; the proxy as an instance to send requests to."""
    instances.start()
    instances.wait_ready()
    lists: dict[str, list[str]] = {"p": [], "d": []}
    for instance in instances.instances.values():
        lists[instance.name[0]].append(f"{instance.host}:{instance.api_port}")
    decode = instances["d0"]
    port = int(decode.args["--master-port"])
    args = ["--prefill-servers-list", ",".join(lists["p"]), "--listen-port", str(port)]
    args += ["--decode-servers-list", ",".join(lists["d"]), "--core-num", str(cores)]
    args += ["--log-file", str(root / "nginx_error.log"), "--log-level", "notice"]
    done = run(root, *args, *options)
    assert done.returncode == 0, done.stderr
    try:
        yield replace(decode, name="c0", api_port=port, process=None)
    finally:
        run(root, "--stop")


@pytest.fixture
def proxy(root: Path, tmp_path: Path) -> Iterator[tuple[Instance, StandinSet]]:
    """A running 2P1D set behind the proxy, seen as an instance to send requests to."""
    with standin_set(tmp_path / "set", prefills=2) as instances, served(root, instances) as entry:
        yield entry, instances


@needs_nginx
def test_the_proxy_moves_kv_from_prefill_to_decode(proxy: tuple[Instance, StandinSet]) -> None:
    entry, instances = proxy
    body = {"model": "qwen", "max_tokens": 20, "prompt": "how are you?"}
    direct = instances["d0"].request("/v1/completions", body).body["choices"][0]["text"]
    name = 'standin:requests_by_source_total{source="external_kv_transfer"}'
    for count in (1, 2):
        answer = entry.request("/v1/completions", body)
        assert answer.body["choices"][0]["text"] == direct
        assert instances["d0"].metric(name) == count
    for prefill in (instances["p0"], instances["p1"]):
        prefill.wait_for_metric("standin:kv_blocks_held", 0)


@needs_nginx
def test_the_proxy_streams_from_decode(proxy: tuple[Instance, StandinSet]) -> None:
    body = {"model": "qwen", "prompt": "how are you?", "stream": True, "max_tokens": 4}
    text = proxy[0].request("/v1/completions", body).text
    assert text.count("data: ") == 5
    assert text.endswith("data: [DONE]\n\n")


@needs_nginx
def test_the_proxy_passes_prefills_error_on(proxy: tuple[Instance, StandinSet]) -> None:
    answer = proxy[0].request("/v1/completions", {"model": "other", "prompt": "x"})
    assert answer.status == 404
    assert "`other` does not exist" in answer.body["message"]


@needs_nginx
def test_the_proxy_has_no_health_but_models(proxy: tuple[Instance, StandinSet]) -> None:
    assert proxy[0].request("/health").status == 404
    assert proxy[0].request("/v1/models").body["data"][0]["id"] == "qwen"


# The balancer pd_score_balance

BODY = {"model": "qwen", "max_tokens": 3, "prompt": "how are you?"}
RUNNING = "vllm:num_requests_running"


def counts(instances: StandinSet, *names: str) -> list[float]:
    """Tokens generated by each instance so far; a prefill generates one per request."""
    return [instances[name].metric("vllm:generation_tokens_total", missing=0) for name in names]


def send_together(entry: Instance, *bodies: dict[str, Any]) -> list[Answer]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: entry.request("/v1/completions", body), bodies))


def send_and_leave(entry: Instance, body: dict[str, Any]) -> socket.socket:
    """Send a completion; the caller closes the connection without reading the answer."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    client = socket.create_connection((entry.host, entry.api_port))
    client.sendall(head.encode() + data)
    return client


def assert_prefill_counters_are_even(entry: Instance, instances: StandinSet) -> None:
    """Too much left on p0 would send a single request to p1, too little a burst to p0 alone."""
    prefills = [instances["p0"], instances["p1"]]
    for prefill in prefills:
        prefill.set_faults()
    before = counts(instances, "p0", "p1")
    assert entry.request("/v1/completions", BODY).status == 200
    assert counts(instances, "p0", "p1") == [before[0] + 1, before[1]]
    for prefill in prefills:
        prefill.set_faults(slow=0.5)
    assert [answer.status for answer in send_together(entry, BODY, BODY)] == [200, 200]
    assert counts(instances, "p0", "p1") == [before[0] + 2, before[1] + 1]
    for prefill in prefills:
        prefill.set_faults()


@needs_nginx
def test_single_requests_all_go_to_the_first_prefill(
    proxy: tuple[Instance, StandinSet],
) -> None:
    entry, instances = proxy
    for _ in range(5):
        assert entry.request("/v1/completions", BODY).status == 200
    assert counts(instances, "p0", "p1") == [5, 0]


@needs_nginx
def test_connections_to_the_chosen_servers_are_kept(proxy: tuple[Instance, StandinSet]) -> None:
    entry, instances = proxy
    for _ in range(3):
        assert entry.request("/v1/completions", BODY).status == 200
    for name in ("p0", "d0"):
        lines = [line for line in instances[name].log().splitlines() if '"POST /v1/' in line]
        assert len(lines) == 3
        assert len({line.split()[1] for line in lines}) == 1  # the client's address and port


@needs_nginx
def test_a_request_that_decode_answers_no_longer_counts_for_prefill(
    proxy: tuple[Instance, StandinSet],
) -> None:
    entry, instances = proxy
    instances["d0"].set_faults(token_seconds=0.4)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(entry.request, "/v1/completions", BODY)
        instances["d0"].wait_for_metric(RUNNING, 1)
        assert entry.request("/v1/completions", BODY).status == 200
        assert first.result().status == 200
    assert counts(instances, "p0", "p1") == [2, 0]


@needs_nginx
def test_a_burst_spreads_over_the_prefills_whichever_worker_takes_it(
    root: Path, tmp_path: Path
) -> None:
    with (
        standin_set(tmp_path / "set", prefills=2) as instances,
        served(root, instances, cores=4) as entry,
    ):
        for name in ("p0", "p1"):
            instances[name].set_faults(slow=1.0)
        assert {answer.status for answer in send_together(entry, *[BODY] * 8)} == {200}
        assert counts(instances, "p0", "p1") == [4, 4]


@needs_nginx
def test_a_long_request_in_flight_weighs_more_than_short_ones(
    proxy: tuple[Instance, StandinSet],
) -> None:
    entry, instances = proxy
    for name in ("p0", "p1"):
        instances[name].set_faults(slow=1.0)
    with ThreadPoolExecutor(4) as pool:
        long = pool.submit(entry.request, "/v1/completions", BODY | {"prompt": "word " * 2000})
        time.sleep(0.3)
        short = [pool.submit(entry.request, "/v1/completions", BODY) for _ in range(3)]
        assert {answer.result().status for answer in (long, *short)} == {200}
    assert counts(instances, "p0", "p1") == [1, 3]


@needs_nginx
def test_the_counters_are_right_after_errors_of_prefill(
    proxy: tuple[Instance, StandinSet],
) -> None:
    entry, instances = proxy
    instances["p0"].set_faults(error_status=503)
    assert {entry.request("/v1/completions", BODY).status for _ in range(3)} == {503}
    assert_prefill_counters_are_even(entry, instances)


@needs_nginx
def test_the_counters_are_right_after_clients_that_left(
    proxy: tuple[Instance, StandinSet],
) -> None:
    entry, instances = proxy
    instances["p0"].set_faults(slow=0.4)
    for _ in range(2):  # while prefill works
        with send_and_leave(entry, BODY):
            time.sleep(0.1)
        time.sleep(0.6)
    instances["p0"].set_faults()
    instances["d0"].set_faults(token_seconds=0.1)
    stream = BODY | {"stream": True, "max_tokens": 30}
    with send_and_leave(entry, stream) as client:  # while decode streams
        assert client.recv(100)
    instances["d0"].set_faults()
    instances["d0"].wait_for_metric(RUNNING, 0)  # the stream has ended
    assert_prefill_counters_are_even(entry, instances)


@needs_nginx
def test_models_are_counted_for_prefill_and_counted_back(
    proxy: tuple[Instance, StandinSet],
) -> None:
    entry, instances = proxy
    for _ in range(3):
        assert entry.request("/v1/models").status == 200
    assert_prefill_counters_are_even(entry, instances)


@needs_nginx
def test_a_dead_prefill_keeps_attracting_requests(proxy: tuple[Instance, StandinSet]) -> None:
    entry, instances = proxy
    instances["p0"].stop()
    assert [entry.request("/v1/completions", BODY).status for _ in range(3)] == [502] * 3
    assert counts(instances, "p1") == [0]


@pytest.fixture
def two_decodes(tmp_path: Path) -> Iterator[StandinSet]:
    """1P and a decode of two servers on two hosts, each of tp 8; not started."""
    with standin_set(tmp_path / "set", prefills=1, decodes=2) as instances:
        for index, name in enumerate(("d0", "d1")):
            decode = instances[name]
            decode.args |= {"--num-dp": "2", "--server-offset": str(index)}
            decode.env["SERVER_OFFSET"] = str(8 * index)
            del decode.env["ASCEND_RT_VISIBLE_DEVICES"]
        yield instances


def running_of(two_decodes: StandinSet) -> list[float]:
    """Requests that each decode server works on."""
    return [two_decodes[name].metric(RUNNING) for name in ("d0", "d1")]


@needs_nginx
def test_single_requests_all_go_to_the_first_decode(root: Path, two_decodes: StandinSet) -> None:
    with served(root, two_decodes) as entry:
        for _ in range(4):
            assert entry.request("/v1/completions", BODY).status == 200
        assert counts(two_decodes, "d0", "d1") == [12, 0]


@needs_nginx
@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1", [2, 2]), ("2", [2, 2]), ("32", [1, 3])],
    ids=["round robin once all are at it", "the other one", "far away"],
)
def test_a_decode_at_its_limit_gets_nothing_more(
    root: Path, two_decodes: StandinSet, limit: str, expected: list[int]
) -> None:
    """d0 has one long request; short ones go to d1, as long as it may take more."""
    set_age(root, NEW)
    with (
        served(root, two_decodes, *options_of(root, limit)) as entry,
        ThreadPoolExecutor(4) as pool,
    ):
        for name in ("d0", "d1"):
            two_decodes[name].set_faults(token_seconds=1.0)
        for count, prompt in enumerate(("word " * 2000, "a", "b", "c"), start=1):
            pool.submit(entry.request, "/v1/completions", BODY | {"prompt": prompt})
            two_decodes["d0"].wait_for(lambda n=count: sum(running_of(two_decodes)) == n, prompt)
        assert running_of(two_decodes) == expected


@needs_nginx
def test_when_all_decodes_are_at_their_limit_it_goes_round(
    root: Path, two_decodes: StandinSet
) -> None:
    set_age(root, NEW)
    with served(root, two_decodes, *options_of(root, "1")) as entry:
        for name in ("d0", "d1"):
            two_decodes[name].set_faults(token_seconds=0.5)
        assert {answer.status for answer in send_together(entry, *[BODY] * 6)} == {200}
        assert counts(two_decodes, "d0", "d1") == [9, 9]
        for name in ("d0", "d1"):
            two_decodes[name].set_faults()
        assert entry.request("/v1/completions", BODY).status == 200
        assert counts(two_decodes, "d0", "d1") == [12, 9]


def options_of(root: Path, decode_limit: str) -> list[str]:
    access_log = str(root / "access.log")
    return ["--decode-max-num-seqs", decode_limit, "--access-log-file", access_log]


@needs_nginx
def test_newer_images_write_an_access_log(root: Path, tmp_path: Path) -> None:
    set_age(root, NEW)
    with (
        standin_set(tmp_path / "set", prefills=1) as instances,
        served(root, instances, *options_of(root, "32")) as entry,
    ):
        assert entry.request("/v1/completions", BODY).status == 200
    lines = (root / "access.log").read_text().splitlines()
    assert len(lines) == 1
    assert '"POST /v1/completions HTTP/1.1" 200 ' in lines[0]


@needs_nginx
def test_a_prompt_of_61000_token_ids_passes(root: Path, tmp_path: Path) -> None:
    """Its kv_transfer_params, with all the ids, stay below the 1 MB of a subrequest."""
    with standin_set(tmp_path / "set", prefills=1) as instances:
        for instance in instances.instances.values():
            instance.args["--extra-args"] = "--max-num-batched-tokens 61440"
        with served(root, instances) as entry:
            body = BODY | {"prompt": [100] * 61000}
            begin = time.monotonic()
            answer = entry.request("/v1/completions", body)
            assert time.monotonic() - begin < 20
            assert answer.body["usage"]["prompt_tokens"] == 61000
            direct = instances["d0"].request("/v1/completions", body)
            assert answer.body["choices"] == direct.body["choices"]
            moved = instances["d0"].metric('standin:kv_transfer_bytes_total{cluster_id="0"}')
            assert moved == 61000 * 256
