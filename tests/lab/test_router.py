"""The real vllm-router sends prefill and decode what vllm-ascend's connector needs.

Its backends only record what they get and answer as the engine would; the test needs no lab.
"""

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from pd_deploy.engines.base import Counter
from pd_deploy.lab import vllm
from pd_deploy.lab.system import wait_until
from pd_deploy.steps.verify import metrics
from tests.lab.registries import free_port
from tests.unit import example
from tests.waiting_rooms import begun, open_room, room, until_connected

# Of vllm-ascend's MooncakeConnectorV1: what a prefill answers, with a field that nobody knows.
HANDED_OVER = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[3, 1, 4], [15]],
    "remote_engine_id": "6f7e0a52-1d0c-4a5e-9f0a-2f6f4f2f8a11",
    "remote_request_id": "cmpl-1",
    "remote_host": "10.0.4.1",
    "remote_port": 36000,
    "remote_ptp_size": None,
    "remote_multi_nodes_meta_mapping": {"0": {"host": "10.0.4.1", "engine_id": "a"}},
    "num_prompt_blocks": 4,
    "last_token_id": 7,
    "unknown": {"nested": [1.5, None, "ü"]},
}


@dataclass
class Backend:
    """A server that records the requests it gets, and answers each in the same way."""

    answer: dict[str, Any]
    address: str = ""
    is_healthy: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def serving(backend: Backend) -> Iterator[Backend]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(b"{}", "application/json", 200 if backend.is_healthy else 503)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            backend.bodies.append(body)
            backend.keys.append(self.headers.get("authorization"))
            document = json.dumps(backend.answer)
            if body.get("stream"):
                self.reply(f"data: {document}\n\ndata: [DONE]\n\n".encode(), "text/event-stream")
            else:
                self.reply(document.encode(), "application/json")

        def reply(self, content: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    backend.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield backend
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": "length"}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice], **more}


@pytest.fixture(scope="module")
def program() -> Path:
    vllm.prepare(print)
    return vllm.ROUTER / "bin/vllm-router"


@pytest.fixture
def backends() -> Iterator[tuple[Backend, Backend]]:
    prefill = Backend(completion("a", kv_transfer_params=HANDED_OVER))
    with serving(prefill) as first, serving(Backend(completion("the answer"))) as second:
        yield first, second


@pytest.fixture
def metrics_port() -> int:
    return free_port()


@contextmanager
def routing(
    program: Path, backends: tuple[Backend, Backend], port: int, metrics_port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The router as the example for vllm-ascend has it, but with these backends and ports."""
    changes = {"prefill": {"p1": None}}
    made = example.plan_of(example.ROOT / "deployments/vllm-ascend-2p1d.yaml", changes)
    argv = [str(program), *made.instance("c0").command.argv[1:]]
    for option, value in (
        ("--prefill", backends[0].address),
        ("--decode", backends[1].address),
        ("--port", str(port)),
        ("--prometheus-port", str(metrics_port)),
    ):
        argv[argv.index(option) + 1] = value
    environment = {**os.environ, "OPENAI_API_KEY": "sk-1"}
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def ready() -> bool:
        assert process.poll() is None, "the router ended"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readiness").is_success
        except httpx.TransportError:
            return False

    try:
        wait_until("the router", ready, 60)
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def router(program: Path, backends: tuple[Backend, Backend], metrics_port: int) -> Iterator[str]:
    port = free_port()
    with routing(program, backends, port, metrics_port):
        yield f"http://127.0.0.1:{port}"


async def test_a_waiting_room_leaves_its_port_to_the_router_and_takes_it_from_one_that_stops(
    program: Path, backends: tuple[Backend, Backend], metrics_port: int
) -> None:
    """The router takes the port although requests that were held are still connected there."""
    async with open_room() as before, httpx.AsyncClient(timeout=60) as client:
        sent = {"model": "qwen", "prompt": "1, 2, 3,", "max_tokens": 2}
        asking = asyncio.ensure_future(client.post(f"{before.url}/v1/completions", json=sent))
        await begun(before, 1)
        before.tell("SIGHUP")
        assert (await before.counts())["held"] == 1
        with routing(program, backends, before.port, metrics_port) as process:
            assert "the answer" in (await asking).text
            assert await before.ended() == 0
            async with room(port=before.port) as after:
                after.tell("SIGUSR1")
                process.terminate()
                process.wait()
                await until_connected(after.port)
                await begun(after, 0)


OF_A_LOAD = {"ignore_eos": True, "stream_options": {"include_usage": True}}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("stream", [False, True])
def test_prefill_makes_a_token_and_decode_gets_what_it_answered(
    router: str, backends: tuple[Backend, Backend], metrics_port: int, stream: bool
) -> None:
    """Also of chats, and whatever a request says of its length. The router counts them."""
    prefill, decode = backends
    for path, request in (
        ("completions", {"prompt": "1, 2, 3,", "max_tokens": 12, "min_tokens": 4}),
        ("completions", {"prompt": [1, 2, 3], "max_tokens": 12, "cache_salt": "x", **OF_A_LOAD}),
        ("chat/completions", CHAT | {"max_tokens": 12}),
        ("chat/completions", CHAT | {"max_completion_tokens": 12}),
    ):
        prefill.bodies.clear()
        decode.bodies.clear()
        sent = {"model": "qwen", "stream": stream, **request}
        if not stream:
            sent.pop("stream_options", None)
        key = {"Authorization": "Bearer a client's"}
        answer = httpx.post(f"{router}/v1/{path}", json=sent, timeout=60, headers=key)
        assert answer.status_code == 200, answer.text
        assert "the answer" in answer.text
        (first,), (second,) = prefill.bodies, decode.bodies
        assert first["kv_transfer_params"]["do_remote_decode"] is True
        assert not first["kv_transfer_params"].get("do_remote_prefill")
        assert first["max_tokens"] == 1
        # A chat's newer name of the limit goes before the older one.
        assert first.get("max_completion_tokens", 1) == 1
        assert first.get("min_tokens", 0) <= 1
        assert not first.get("stream")
        assert not first.get("stream_options"), "engines refuse it without a stream"
        assert second["kv_transfer_params"] == HANDED_OVER
        limits = ("max_tokens", "max_completion_tokens", "min_tokens", "stream", "cache_salt",
                  *OF_A_LOAD)  # fmt: skip
        assert {k: second[k] for k in limits if k in sent} == {
            k: sent[k] for k in limits if k in sent
        }
    # It sends its own in place of the client's, and lets everybody in.
    assert {*prefill.keys, *decode.keys} == {"Bearer sk-1"}
    page = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
    assert metrics.total([metrics.parse(page)], Counter("vllm_router_pd_requests_total")) == 4
