"""How the stand-in's ports behave: idle connections, TIME_WAIT, the launcher's check."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.lab.standin.processes import LAUNCHER, PYTHON, Instance, StandinSet, standin_set

BODY = {"model": "qwen", "max_tokens": 4, "prompt": "how are you?"}
KEEP_ALIVE = 1.0  # seconds
LONGER = 1.5
TIME_WAIT = "06"  # in /proc/net/tcp
# How pd-deploy starts the launcher: a port in TIME_WAIT is free for it.
WRAPPER = """
import runpy, socket, sys
bind = socket.socket.bind
def reusing(self, address):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return bind(self, address)
socket.socket.bind = reusing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinSet]:
    """A 1P1D set that closes idle connections after KEEP_ALIVE; tests leave it as they found it."""
    with standin_set(tmp_path_factory.mktemp("standin"), prefills=1) as instances:
        for instance in instances.instances.values():
            instance.env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = f"{KEEP_ALIVE:g}"
        instances.start()
        instances.wait_ready()
        yield instances


def connect(instance: Instance) -> socket.socket:
    return socket.create_connection((instance.host, instance.api_port), timeout=10)


def get_health(client: socket.socket, *headers: str) -> bytes:
    lines = ["GET /health HTTP/1.1", "Host: x", *headers, "", ""]
    client.sendall("\r\n".join(lines).encode())
    return client.recv(10_000)


def seconds_until_closed(client: socket.socket) -> float:
    begin = time.monotonic()
    assert client.recv(1) == b""
    return time.monotonic() - begin


def time_waits_at(port: int) -> int:
    """Connections in TIME_WAIT whose own port it is."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == TIME_WAIT for row in rows)


def completion(body: dict[str, Any]) -> tuple[bytes, bytes]:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode(), data


def test_an_idle_connection_is_closed_by_the_server(running: StandinSet) -> None:
    server = running["p0"]
    before = time_waits_at(server.api_port)
    with connect(server) as client:
        assert b"200 OK" in get_health(client)
        assert 0.9 * KEEP_ALIVE < seconds_until_closed(client) < 4 * KEEP_ALIVE
    assert time_waits_at(server.api_port) == before + 1


def test_each_request_starts_the_pause_anew(running: StandinSet) -> None:
    with connect(running["p0"]) as client:
        for _ in range(5):
            assert b"200 OK" in get_health(client)
            time.sleep(0.3 * KEEP_ALIVE)
        assert b"200 OK" in get_health(client)


def test_it_is_five_seconds_unless_told(pair: StandinSet) -> None:
    pair.start()
    pair.wait_ready()
    with connect(pair["p0"]) as client:
        get_health(client)
        assert 4.9 < seconds_until_closed(client) < 20


def test_the_wait_for_the_first_request_is_not_bounded(running: StandinSet) -> None:
    with connect(running["p0"]) as client:
        time.sleep(LONGER)
        assert b"200 OK" in get_health(client)


def test_connection_close_is_closed_by_the_server_at_once(running: StandinSet) -> None:
    server = running["d0"]
    before = time_waits_at(server.api_port)
    with connect(server) as client:
        answer = get_health(client, "Connection: close")
        assert b"Connection: close\r\n" in answer
        assert seconds_until_closed(client) < KEEP_ALIVE
    assert time_waits_at(server.api_port) == before + 1


def test_a_client_that_closes_first_leaves_nothing_at_the_server(running: StandinSet) -> None:
    server = running["d0"]
    before = time_waits_at(server.api_port)
    with connect(server) as client:
        get_health(client)
    time.sleep(0.2)
    assert time_waits_at(server.api_port) == before


def test_a_slow_body_is_not_cut(running: StandinSet) -> None:
    head, data = completion(BODY)
    with connect(running["d0"]) as client:
        get_health(client)
        client.sendall(head + data[:10])
        time.sleep(LONGER)
        client.sendall(data[10:])
        assert b"200 OK" in client.recv(10_000)


def test_a_long_generation_is_not_cut(running: StandinSet) -> None:
    running["d0"].set_faults(token_seconds=LONGER / 3)
    with connect(running["d0"]) as client:
        get_health(client)
        client.sendall(b"".join(completion(BODY)))
        answer = client.recv(10_000)
    running["d0"].set_faults()
    assert b"200 OK" in answer


def test_a_slow_reader_is_not_cut(running: StandinSet) -> None:
    # More events than the sockets' buffers hold: the server is stuck in the middle.
    body = BODY | {"ignore_eos": True, "stream": True, "max_tokens": 25_000}
    with socket.socket() as client:
        client.settimeout(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.connect((running["d0"].host, running["d0"].api_port))
        get_health(client)
        client.sendall(b"".join(completion(body)))
        time.sleep(4 * LONGER)  # it needs about 3 s until it is stuck
        assert running["d0"].metric("vllm:num_requests_running") == 1
        found = b""
        while b"data: [DONE]" not in found[-200:]:
            found += client.recv(1 << 20)
    assert found.count(b"data: ") == 25_001


# The launcher's check


def make_time_wait(host: str, port: int) -> None:
    """Leave a connection in TIME_WAIT on this port, as an earlier server does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
        with socket.create_connection((host, port)) as client:
            accepted, _ = listener.accept()
            accepted.close()
            assert client.recv(1) == b""
    assert time_waits_at(port) == 1


def test_a_port_in_time_wait_stops_the_launcher(pair: StandinSet) -> None:
    server = pair["p0"]
    make_time_wait(server.host, server.api_port)
    server.start()
    assert server.exit_code() == 1
    assert f"base API port {server.api_port} is already in use" in server.launcher_log()


def test_the_launcher_starts_in_a_wrapper_that_sets_so_reuseaddr(pair: StandinSet) -> None:
    for server in pair.instances.values():
        server.launcher = [PYTHON, "-S", "-c", WRAPPER, str(LAUNCHER)]
        make_time_wait(server.host, server.api_port)
    pair.start()
    pair.wait_ready()
    assert time_waits_at(pair["p0"].api_port) == 1


def test_the_engine_itself_binds_a_port_in_time_wait(pair: StandinSet) -> None:
    """As vLLM does; here without the launcher."""
    server = pair["p0"]
    make_time_wait(server.host, server.api_port)
    ranks = {"VLLM_DP_SIZE": "1", "VLLM_DP_RANK": "0", "VLLM_DP_RANK_LOCAL": "0"}
    environment = {
        "PATH": f"{pair.directory / 'bin'}:/usr/bin:/bin",
        **server.env,
        **ranks,
        "VLLM_DP_MASTER_IP": server.host,
        "VLLM_DP_MASTER_PORT": "1",
        "HCCL_CONNECT_TIMEOUT": "1",
    }
    command = ["vllm", "serve", str(pair.directory / "model"), "--port", str(server.api_port)]
    command += ["--tensor-parallel-size", "8", "--kv-transfer-config", json.dumps(server.kv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "no link with decode after HCCL_CONNECT_TIMEOUT=1 s" in done.stderr
