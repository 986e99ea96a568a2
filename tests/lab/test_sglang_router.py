"""SGLang's real router takes what we render, and sends prefill and decode what SGLang needs.

Its backends only record what they get and answer as the engine would; the test needs no lab.
"""

import re
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from pd_deploy.engines.base import Counter
from pd_deploy.lab import sglang
from pd_deploy.lab.system import wait_until
from pd_deploy.steps.verify import metrics
from tests.lab.registries import free_port
from tests.lab.test_router import CHAT, Backend, completion, serving
from tests.unit import example

FILE = example.ROOT / "deployments/sglang-gpu-2p1d.yaml"
PORTS = {"8998": 0, "9014": 1}
"""The prefills' bootstrap ports in this file."""


@pytest.fixture
def backends() -> Iterator[tuple[Backend, Backend, Backend]]:
    """Two prefills, of which the second is not well yet, and a decode."""
    of_decode = Backend(completion("the answer"))
    with (
        serving(Backend(completion("a"))) as first,
        serving(Backend(completion("a"), is_healthy=False)) as second,
        serving(of_decode) as decode,
    ):
        yield first, second, decode


def test_the_router_knows_all_servers_late_and_has_each_pair_meet_in_a_room(
    backends: tuple[Backend, Backend, Backend],
) -> None:
    sglang.prepare_router(print)
    spec = example.plan_of(FILE).instance("c0")
    addresses = {
        f"http://10.0.5.{address}": backend.address
        for address, backend in zip(("1:30000", "1:30001", "2:30100"), backends, strict=True)
    }
    argv = [addresses.get(word, word) for word in spec.command.argv]
    port, metrics_port = free_port(), free_port()
    for option, value in (("--port", port), ("--prometheus-port", metrics_port)):
        argv[argv.index(option) + 1] = str(value)
    argv[0] = str(sglang.ROUTER / "bin/python")
    known = re.search(r"grep -qE '(.*)' <&3", spec.start_script.content)
    assert known
    asked = subprocess.run([*argv, "--help"], capture_output=True, check=False)
    assert asked.returncode == 0
    refused = subprocess.run([*argv, "--no-such-option"], capture_output=True, check=False)
    assert b"unrecognized arguments: --no-such-option" in refused.stderr

    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def readiness() -> httpx.Response | None:
        assert process.poll() is None, "the router ended"
        try:
            return httpx.get(f"{url}/readiness")
        except httpx.TransportError:
            return None

    def is_ready() -> bool:
        said = readiness()
        return said is not None and said.is_success

    def knows_all() -> bool:
        said = readiness()
        return said is not None and bool(re.search(known[1], said.text))

    try:
        wait_until("the router", is_ready, 60)
        assert not knows_all()  # it says so with one prefill of two
        backends[1].is_healthy = True
        wait_until("the second prefill", knows_all, 60)
        met = [ask(url, path, backends, stream) for path in SENT for stream in (False, True)]
        assert {index for index, _ in met} == {0, 1}
        assert len({room for _, room in met}) == len(met)
        ids = {"model": "llama", "prompt": [1, 2, 3]}
        assert httpx.post(f"{url}/v1/completions", json=ids).status_code == 422
        page = metrics.parse(httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text)
        assert metrics.total([page], Counter("smg_router_requests_total")) == len(met)
    finally:
        process.terminate()
        assert process.wait() == 0


SENT = {
    "completions": {"prompt": "1, 2, 3,", "max_tokens": 12, "cache_salt": "x"},
    "chat/completions": CHAT | {"max_completion_tokens": 12},
}


def ask(
    url: str, path: str, backends: tuple[Backend, Backend, Backend], stream: bool
) -> tuple[int, int]:
    """Which prefill was asked, and the room; both got the prompt as it was sent."""
    for backend in backends:
        backend.bodies.clear()
    sent = {"model": "llama", "stream": stream, **SENT[path]}
    answer = httpx.post(f"{url}/v1/{path}", json=sent, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "the answer" in answer.text
    (body,) = backends[2].bodies
    index = PORTS[str(body["bootstrap_port"])]
    assert backends[index].bodies == [body]
    assert backends[1 - index].bodies == []
    assert body["bootstrap_host"] == "127.0.0.1"
    assert {key: body[key] for key in sent} == sent
    return index, body["bootstrap_room"]
