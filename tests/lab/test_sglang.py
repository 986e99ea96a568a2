"""The smoke test on SGLang's stand-in behind SGLang's own router; it needs no lab."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from pd_deploy import engines
from pd_deploy.config import yaml_files
from pd_deploy.config.load import parse_deployment
from pd_deploy.engines.routed import RoutedEngine
from pd_deploy.errors import SmokeTestFailed
from pd_deploy.lab import sglang
from pd_deploy.lab.system import wait_until
from pd_deploy.planning import placement
from pd_deploy.steps.verify.servers import reached
from pd_deploy.steps.verify.smoke import Entrance, handed_over
from tests.lab.registries import free_port
from tests.unit import example

FILE = example.ROOT / "deployments/lab-sglang-2p1d.yaml"
HERE = {f"10.77.0.1{host}": f"127.5.{os.getpid() % 256}.{host}" for host in (1, 2)}
"""Where the example's hosts are: on this machine, at addresses that no other run has."""
PORT, METRICS_PORT = free_port(), free_port()
OVER_TWO_HOSTS = {"p1": {"host": None, "hosts": ["b", "a"], "devices": {"b": "0", "a": "2"}}}


class Elsewhere(httpx.AsyncHTTPTransport):
    """Sends requests to where the hosts are."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = request.content.decode()
        for there, here in HERE.items():
            content = content.replace(there, here)
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length")}
        url = request.url.copy_with(host=HERE.get(request.url.host, request.url.host))
        moved = httpx.Request(
            request.method, url, headers=headers, content=content, extensions=request.extensions
        )
        return await super().handle_async_request(moved)


@dataclass
class Host:
    """A host, as far as the smoke test uses it."""

    where: str

    @asynccontextmanager
    async def http(
        self, address: str, port: int, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(
            transport=Elsewhere(), trust_env=False, headers=headers
        ) as client:
            yield client


class Session:
    """What the smoke test uses of a session."""

    authorization: Mapping[str, str] = MappingProxyType({})

    def __init__(self, changes: Mapping[str, Any]) -> None:
        self.changes = {
            "prefill": OVER_TWO_HOSTS,
            "proxy": {"c0": {"port": PORT}},
            "sglang": {"router_metrics_port": METRICS_PORT},
            **changes,
        }
        self.deployment = parse_deployment(yaml_files.merge(yaml_files.read(FILE), self.changes))
        self.topology = placement.build(self.deployment)
        self.engine = engines.get("sglang")

    def host(self, name: str) -> Host:
        return Host(f"{name} ({self.deployment.hosts[name].address})")

    def host_of(self, name: str) -> Host:
        return self.host(self.topology.host_of(name))


@contextmanager
def serving(session: Session, directory: Path) -> Iterator[None]:
    """All servers, and the router open to the smoke test and then to clients, by their scripts."""
    sglang.prepare_router(print)
    model = directory / "model"
    model.mkdir()
    moved = {**HERE, session.deployment.model.path: str(model)}
    environment = {**os.environ, "PYTHONPATH": str(sglang.STANDIN)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    made = example.plan_of(FILE, session.changes)
    with ExitStack() as stack:
        logs = {}
        for name in session.topology.names:
            text = made.instance(name).start_script.content
            for old, new in moved.items():
                text = text.replace(old, new)
            logs[name] = directory / f"{name}.log"
            script = ["bash", "-c", text]
            log = stack.enter_context(logs[name].open("w"))
            # No ~/.bashrc of whoever runs the tests.
            process = subprocess.Popen(
                script, stdout=log, stderr=log, env=environment | {"HOME": str(directory)}
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        for server in (server for pod in session.topology.pods for server in pod.servers):
            address, _, port = server.partition(":")
            url = f"http://{HERE[address]}:{port}/health"
            wait_until(server, lambda url=url: answers(url), 60)
        for text in (RoutedEngine.PROVING, RoutedEngine.OPENED):
            wait_until("the router", lambda: RoutedEngine.PREPARED in logs["c0"].read_text(), 60)
            process.send_signal(signal.Signals[RoutedEngine.OPEN_SIGNAL])
            wait_until(text, lambda text=text: text in logs["c0"].read_text(), 60)
        yield


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with serving(Session({}), tmp_path_factory.mktemp("sglang")):
        yield


async def test_all_ways_of_kv_are_proven_directly_and_through_the_router() -> None:
    """Also that of a prefill over two hosts; a prompt of tokens goes round the router."""
    session: Any = Session({})
    proxy = session.topology.proxies[0]
    async with reached(session) as servers, session.host("a").http("", 0) as client:
        direct = await handed_over(session, servers)
        entrance = Entrance(session, proxy, client, proxy.address, is_open=False)
        _, through = await entrance.handed_over(servers)
        remarks = await entrance.checked(servers)
    assert {(way.prefill, way.decode) for way in direct.ways} == {
        ("p0 (a)", "d0 (b)"),
        ("p1-0 (b)", "d0 (b)"),
    }
    for way in (*direct.ways, *through.ways):
        assert way.complete
        assert way.kv_bytes
    assert through.ways[0].proxied
    assert (direct.unseen, through.unseen, remarks) == ("", "", [])


async def test_a_decode_that_is_told_a_wrong_bootstrap_port_fails_the_smoke_test() -> None:
    """Its prefill, which would wait five minutes for it, is given up."""
    session: Any = Session({"ports": {"zmq": 9500}})
    async with reached(session) as servers:
        with pytest.raises(SmokeTestFailed, match=r"Could not fetch prefill parallel info from "):
            await handed_over(session, servers)
