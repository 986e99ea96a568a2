"""The stand-in's global proxy: its arguments, its configuration, the hand-over through nginx."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.standin.processes import STANDIN, Instance, StandinSet, standin_set

SCRIPTS = STANDIN / "image/workspace/omniinfer"
SCRIPT = SCRIPTS / "tools/scripts/global_proxy.sh"
BUILD = SCRIPTS / "omni/accelerators/sched/global_proxy/build.sh"
HANDOVER = STANDIN / "image/usr/libexec/standin/pd_handover.lua"
NGINX = Path("/usr/sbin/nginx")
LUA = Path("/usr/lib/nginx/modules/ngx_http_lua_module.so")
LISTS = ["--prefill-servers-list", "10.0.0.1:9000", "--decode-servers-list", "10.0.0.2:9100"]

needs_nginx = pytest.mark.skipif(
    not (NGINX.exists() and LUA.exists()), reason="nginx with its Lua module is not installed"
)


@pytest.fixture
def root() -> Iterator[Path]:
    """A root directory with the image's proxy files and links to the machine's nginx."""
    with tempfile.TemporaryDirectory() as directory:
        # nginx's workers give up root: below pytest's own directory they could read nothing.
        Path(directory).chmod(0o755)
        fill_root(Path(directory))
        yield Path(directory)


def fill_root(root: Path) -> None:
    prefix = root / "usr/local/nginx"
    (prefix / "modules").mkdir(parents=True)
    (prefix / "nginx").symlink_to(NGINX)
    (prefix / "modules/pd_handover.lua").symlink_to(HANDOVER)
    for shared in ("usr/lib/nginx", "usr/share/lua"):
        (root / shared).parent.mkdir(parents=True, exist_ok=True)
        (root / shared).symlink_to(f"/{shared}")


def run(root: Path, *args: str, script: Path = SCRIPT, **env: str) -> Any:
    environment = {**os.environ, "STANDIN_ROOT": str(root), **env}
    return subprocess.run(
        ["bash", str(script), *args], env=environment, capture_output=True, text=True, check=False
    )


def conf_of(root: Path) -> str:
    return (root / "usr/local/nginx/conf/nginx.conf").read_text()


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


def test_the_build_needs_unpacked_sources_and_no_http_proxy(tmp_path: Path) -> None:
    build = tmp_path / "build.sh"
    build.write_text(BUILD.read_text())
    kept = tmp_path / "usr/libexec/standin"
    kept.mkdir(parents=True)
    (kept / "nginx").write_text("binary")
    (kept / HANDOVER.name).write_text("lua")
    assert "does not exist: unpack" in run(tmp_path, script=build).stderr
    (tmp_path / "nginx-1.24.0").mkdir()
    assert "unset both" in run(tmp_path, script=build, http_proxy="http://proxy:3128").stderr
    assert run(tmp_path, script=build).returncode == 0
    assert (tmp_path / "usr/local/nginx/nginx").read_text() == "binary"
    assert (tmp_path / "usr/local/nginx/modules" / HANDOVER.name).read_text() == "lua"


@pytest.fixture
def proxy(root: Path, tmp_path: Path) -> Iterator[tuple[Instance, StandinSet]]:
    """A running 2P1D set behind the proxy, seen as an instance to send requests to."""
    with standin_set(tmp_path / "set", prefills=2) as instances:
        instances.start()
        instances.wait_ready()
        decode = instances["d0"]
        port = int(decode.args["--master-port"])
        prefills = ",".join(f"{p.host}:{p.api_port}" for p in (instances["p0"], instances["p1"]))
        args = ["--prefill-servers-list", prefills, "--listen-port", str(port), "--core-num", "1"]
        args += ["--decode-servers-list", f"{decode.host}:{decode.api_port}"]
        args += ["--log-file", str(root / "nginx_error.log"), "--log-level", "notice"]
        done = run(root, *args)
        assert done.returncode == 0, done.stderr
        try:
            yield replace(decode, name="c0", api_port=port, process=None), instances
        finally:
            run(root, "--stop")


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
        prefill.wait_for(lambda p=prefill: p.metric("standin:kv_blocks_held") == 0, "release")


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
