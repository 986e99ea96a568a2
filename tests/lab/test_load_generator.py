"""The program that runs a load generator in a container, with the stand-ins' generators: as plain
processes, against a server that answers here."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pd_deploy.config.models import Benchmark
from pd_deploy.engines import load_generator, load_in_container
from pd_deploy.engines.load_generator import (
    KEY_VARIABLE,
    Answer,
    Asked,
    LoadGenerator,
    sglang_bench,
    vllm_bench,
)
from pd_deploy.lab import contracts, sglang
from pd_deploy.lab.system import wait_until
from pd_deploy.records import load_results
from tests.unit import example

IMAGE = contracts.STANDIN / "image"
LOAD = Benchmark(requests=20, concurrency=4, input_length=6, output_length=5, seconds=30)
REAL = json.loads((example.ROOT / "tests/data/vllm-bench.json").read_text())
"""What `vllm bench serve` of vLLM 0.32 wrote."""
KEY = "sk-never-in-arguments"
PACKAGES = "usr/local/lib/python3.11/dist-packages"
BIN = "usr/local/Ascend/latest/bin"


class Server(ThreadingHTTPServer):
    """What streams tokens; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.status = 200
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.add(self.headers["authorization"])
        self.send_response(self.server.status)
        self.end_headers()
        if self.server.status != 200:
            return
        event = {"choices": [{"text": " sun"}]}
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
        is_counted = body.get("stream_options", {}).get("include_usage")
        for each in [*[event] * body["max_tokens"], *([usage] if is_counted else [])]:
            self.wfile.write(f"data: {json.dumps(each)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where an image's files are, as far as they are needed, and a model's directory."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer_config.json").write_text("{}")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def image(root: Path, contract: str) -> dict[str, str]:
    """The environment of what runs in omni-infer's image of a contract."""
    for part in ("usr/local/Ascend", PACKAGES):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", IMAGE / part, root / part], check=True)
    for path, content in contracts.layer(contract).items():
        if path.startswith(PACKAGES) and content is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            data = content.encode() if isinstance(content, str) else content
            (root / path).write_bytes(data)
    (root / BIN / "vllm").chmod(0o755)
    return {"PATH": f"{root / BIN}:{os.environ['PATH']}", "PYTHONPATH": str(root / PACKAGES)}


@contextmanager
def running(
    root: Path, generator: LoadGenerator, url: str, env: dict[str, str], load: Benchmark = LOAD
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a container, with what waits for it at its standard input."""
    asked = Asked(url, "qwen", str(root / "model"), load, seed=7)
    argv = generator.in_container(asked)
    assert KEY not in "".join(argv)
    environment = {
        "HOME": str(root), "TMPDIR": str(root / "tmp"), "http_proxy": "http://127.0.0.1:9",
        KEY_VARIABLE: KEY, **env,
    }  # fmt: skip
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        yield process


def answer(*given: Any, **options: Any) -> Answer:
    """What the command says."""
    with running(*given, **options) as process:
        assert process.stdout
        said = process.stdout.read().decode()
    return load_generator.parse(said)


@pytest.mark.parametrize("contract", contracts.CONTRACTS)
def test_vllms_own_measures_what_it_is_asked_by_the_options_of_its_age(
    root: Path, server: Server, contract: str
) -> None:
    found = answer(root, vllm_bench("vllm", trusts_code=True), server.url, image(root, contract))
    assert found.version == contracts.CONTRACTS[contract].versions["vllm"]
    assert found.result, found
    samples, seconds = load_results.samples(found.result)
    assert [(s.tokens, s.fault) for s in samples] == [(5, "")] * 20
    assert all(0 < s.ttft < seconds for s in samples if s.ttft)
    assert len(server.asked) == 21, "the first one is a test, which does not count"
    prompts = {body["prompt"] for body in server.asked}
    assert (len(prompts), {len(prompt.split()) for prompt in prompts}) == (20, {6})
    assert {(b["max_tokens"], b["ignore_eos"], b["temperature"]) for b in server.asked} == {
        (5, True, 0)
    }
    assert server.keys == {f"Bearer {KEY}"}
    assert not [*(root / "tmp").iterdir()]
    unlike = {
        key: value
        for key, value in found.result.items()
        if type(value) is not type(REAL[key])
        or (isinstance(value, list) and type(value[0]) is not type(REAL[key][0]))
    }
    assert not unlike, "the stand-in's result has the form of the real one"


def test_sglangs_own_measures_what_it_is_asked(root: Path, server: Server) -> None:
    for path, content in sglang.sources().items():
        (root / "packages" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "packages" / path).write_bytes(content)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root / "packages")}
    found = answer(root, sglang_bench("python3"), server.url, env)
    assert found.version == sglang.IMAGE_TAG.removeprefix("v")
    assert found.result, found
    samples, _ = load_results.samples(found.result)
    assert [(s.tokens, s.fault) for s in samples] == [(5, "")] * 20
    assert {len(body["prompt"].split()) for body in server.asked} == {6}
    assert server.keys == {f"Bearer {KEY}"}


def test_what_keeps_it_from_measuring_is_said(root: Path, server: Server) -> None:
    env = image(root, "v0")
    server.status = 503
    found = answer(root, vllm_bench("vllm"), server.url, env)
    assert (found.result, found.code) == (None, 1)
    assert "Initial test run failed" in found.said
    server.status = 200
    (root / "model/tokenizer_config.json").unlink()
    assert "Can't load tokenizer" in answer(root, vllm_bench("vllm"), server.url, env).said
    (root / PACKAGES / "vllm/benchmarks/serve.py").unlink()
    found = answer(root, vllm_bench("vllm"), server.url, env)
    assert found.missing == "package vllm 0.9.0+empty has no benchmarks/serve.py"
    found = answer(root, vllm_bench("no-such-vllm"), server.url, env)
    assert found.missing == "there is no program no-such-vllm"
    found = answer(root, sglang_bench("python3"), server.url, env)
    assert found.missing == "package sglang is not installed"


def looked_for(root: Path, generator: LoadGenerator, env: dict[str, str]) -> Answer:
    """What the command says that only looks for a generator."""
    environment = {"HOME": str(root), **env}
    argv = generator.look_in_container()
    said = subprocess.run(argv, capture_output=True, text=True, env=environment, check=True)
    return load_generator.parse(said.stdout)


def test_it_is_looked_for_without_being_run(root: Path, server: Server) -> None:
    env = image(root, "v0")
    found = looked_for(root, vllm_bench("vllm"), env)
    assert found == Answer(version=contracts.CONTRACTS["v0"].versions["vllm"])
    assert not server.asked
    assert looked_for(root, sglang_bench("python3"), env).missing
    (root / PACKAGES / "vllm/benchmarks/serve.py").unlink()
    missing = "package vllm 0.9.0+empty has no benchmarks/serve.py"
    assert looked_for(root, vllm_bench("vllm"), env) == Answer(missing=missing)


@pytest.fixture
def endless(root: Path) -> dict[str, str]:
    """The environment of a generator that never ends, nor does what it has started."""
    env = image(root, "v0")
    program = root / BIN / "vllm"
    started = root / "started"
    program.write_text(
        f"#!{sys.executable}\nimport subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\n"
        "print('under way', flush=True)\ntime.sleep(1000)\n"
    )
    return env


def child(root: Path) -> int:
    """The process that an endless generator has started."""
    started = root / "started"
    wait_until("it to start", lambda: started.is_file() and started.read_text() != "", timeout=20)
    return int(started.read_text())


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_it_ends_with_whoever_waits_for_it(
    root: Path, server: Server, endless: dict[str, str]
) -> None:
    with running(root, vllm_bench("vllm"), server.url, endless) as process:
        started = child(root)
        assert process.stdin
        process.stdin.close()
        process.wait(timeout=20)
    wait_until("it to end", lambda: is_gone(started), timeout=20)
    assert not [*(root / "tmp").iterdir()]


def test_it_ends_when_its_time_is_over(root: Path, server: Server, endless: dict[str, str]) -> None:
    began = time.monotonic()
    short = LOAD.model_copy(update={"seconds": 1})
    found = answer(root, vllm_bench("vllm"), server.url, endless, short)
    assert time.monotonic() - began > 1
    assert (found.late, found.result, found.said) == (True, None, "under way")
    assert is_gone(child(root))


def test_the_python_of_a_program_is_the_one_that_runs_it(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\n")
    assert load_in_container.interpreter(program) == sys.executable
    program.write_text("#!/usr/bin/env python3\n")
    assert Path(load_in_container.interpreter(program)).name == "python3"
    program.write_bytes(b"\x7fELF")
    assert load_in_container.interpreter(program) == sys.executable
