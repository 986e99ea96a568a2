"""What becomes of a Prefect server that is not there, not ready or not ours to use."""

import http.server
import os
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from prefect.blocks.core import Block
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_API_URL, temporary_settings

from pd_deploy.blocks import loading
from pd_deploy.blocks import server as blocks_server
from pd_deploy.blocks.server import spare_the_proxy
from pd_deploy.cli import prefect_api
from pd_deploy.cli.hosts import asking
from pd_deploy.cli.local_http import is_healthy
from pd_deploy.cli.prefect_api import ServerLost, ServerRefuses
from tests.unit import example

NAMES = ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY")


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers all requests alike, and counts them."""

    status, kind, asked, busy_s = 200, "application/json", 0, 0.0

    def do_GET(self) -> None:
        type(self).asked += 1
        time.sleep(self.busy_s)
        self.send_response(self.status)
        self.send_header("content-type", self.kind)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Answers]]]:
    answers = type("Answers", (Answers,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answers) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", answers
        listening.shutdown()


@pytest.mark.parametrize(
    ("path", "status", "kind", "told"),
    [
        ("/api", 401, "application/json", "wants credentials.*set PREFECT_API_AUTH_STRING"),
        ("/api", 403, "application/json", "wants credentials.*set PREFECT_API_AUTH_STRING"),
        ("", 404, "application/json", r"the URL ends with /api: PREFECT_API_URL=\S+/api"),
        ("", 200, "text/html", r"the URL ends with /api: PREFECT_API_URL=\S+/api"),
        ("/api", 503, "text/html", "answers 503.*NO_PROXY"),
    ],
)
def test_what_the_server_refuses_is_told(
    server: tuple[str, type[Answers]], path: str, status: int, kind: str, told: str
) -> None:
    url, answers = server
    answers.status, answers.kind = status, kind
    with (
        temporary_settings({PREFECT_API_URL: url + path}),
        pytest.raises(ServerRefuses, match=told),
        prefect_api.served(),
    ):
        pytest.fail("nothing is asked of such a server")


def test_a_server_that_does_not_answer_is_told() -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(ServerLost, match="prefect server start"),
        prefect_api.served(),
    ):
        pytest.fail("nothing is asked of such a server")


@pytest.mark.parametrize(
    "error", [httpx.InvalidURL("Invalid port: 'x'"), ValueError("Unknown scheme for proxy URL x")]
)
async def test_a_way_to_the_server_that_cannot_be_gone_is_told_and_no_block_is_missed(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def load(cls: type[Block], name: str) -> None:
        raise error

    monkeypatch.setattr(Block, "aload", classmethod(load))
    monkeypatch.setenv("ALL_PROXY", "x")
    with (
        pytest.raises(ServerLost, match=rf"found none \({error}\).*; check .*ALL_PROXY, too"),
        prefect_api.reached(),
    ):
        await loading.ssh("x", "ssh.credentials")
    with pytest.raises(ValueError, match="not of ours"), prefect_api.reached():
        raise ValueError("not of ours")


@pytest.mark.parametrize("url", ["http://127.0.0.1:x/api", "http://[::1", "", "x"])
def test_a_url_that_is_none_is_left_to_those_who_ask_there(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    for key in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(key, "")
    spare_the_proxy(url)
    assert os.environ["NO_PROXY"].startswith("127.0.0.1,localhost,::1")


def test_a_busy_server_is_waited_for(
    server: tuple[str, type[Answers]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as Prefect's client would wait; then it is told apart from one that is away."""
    monkeypatch.setattr(prefect_api, "ANSWER_TIMEOUT_S", 0.1)
    url, answers = server
    answers.busy_s = 0.5
    with temporary_settings({PREFECT_API_URL: f"{url}/api"}), prefect_api.served():
        assert answers.asked == 1
    with (
        temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_API_REQUEST_TIMEOUT: 0.1}),
        pytest.raises(ServerLost, match=r"sent no answer within 0\.1 s → look at its log"),
        prefect_api.served(),
    ):
        pytest.fail("nothing is asked of such a server")


@pytest.mark.parametrize(
    ("name", "exempt"),
    [(name, dict[str, str]()) for name in NAMES]
    + [(NAMES[0], {key: "10.0.0.9"}) for key in ("NO_PROXY", "no_proxy")],
)
def test_no_proxy_is_asked_for_this_machine(
    server: tuple[str, type[Answers]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    exempt: dict[str, str],
) -> None:
    for each in (*NAMES, "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(each, raising=False)
    for key, value in exempt.items():
        monkeypatch.setenv(key, value)
    # Restored after the test, as they are set by what is tested.
    for key in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(key, os.environ.get(key, ""))
    monkeypatch.setenv(
        name, "socks5://127.0.0.1:9" if "all" in name.lower() else "http://127.0.0.1:9"
    )
    url, answers = server
    with temporary_settings({PREFECT_API_URL: f"{url}/api"}), prefect_api.served():
        assert httpx.get(url.replace("127.0.0.1", "localhost")).is_success
    assert answers.asked == 2
    assert all(value in os.environ["no_proxy"].split(",") for value in exempt.values())


@pytest.mark.parametrize("name", NAMES)
async def test_nor_by_commands_that_do_without_prefect(
    server: tuple[str, type[Answers]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for each in NAMES:
        monkeypatch.delenv(each, raising=False)
    for each in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(each, "")
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    url, _ = server
    assert is_healthy(f"{url}/api")
    async with blocks_server.client({"PREFECT_API_URL": url}) as client:
        assert (await client.get(url)).is_success
    # Its blocks may be read by Prefect itself.
    monkeypatch.setenv("PREFECT_API_URL", "http://10.1.2.3:4200/api")
    with asking([example.service({"ssh": {"credentials": "x"}})]):
        assert os.environ["no_proxy"] == "127.0.0.1,localhost,::1,10.1.2.3"


@pytest.mark.parametrize(
    ("host", "near"),
    [("10.1.2.3", True), ("prefect", True), ("8.8.8.8", False), ("api.prefect.cloud", False)],
)
def test_a_server_nearby_is_not_asked_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, host: str, near: bool
) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    spare_the_proxy(f"http://{host}:4200/api")
    assert (host in os.environ["NO_PROXY"].split(",")) == near
