"""The waiting room's program over real sockets: what clients get while no proxy serves."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from pd_deploy.cli.local_http import free_port
from pd_deploy.steps import waiting_room_program as program
from tests.waiting_rooms import HERE, PATIENCE_S, begun, open_room, raw, room, until_connected


class Proxy:
    """A proxy that listens at all addresses, and answers with what it was asked."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.go_on = asyncio.Event()

    @asynccontextmanager
    async def listening(self, port: int, shares_port: bool = True) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "0.0.0.0", port, reuse_port=shares_port)
        try:
            yield
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                request = program.Request(head)
                if "chunked" in request.field("transfer-encoding"):
                    body = await reader.readuntil(b"0\r\n\r\n")
                else:
                    body = await reader.readexactly(int(request.field("content-length") or 0))
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for part in (b"first ", body):
                    if part:
                        writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                    if "stream" in request.path:
                        await self.go_on.wait()
                writer.write(b"0\r\n\r\n")
                await writer.drain()
                if "close" in request.field("connection").lower():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def asking() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False)


async def test_requests_are_held_and_reach_the_new_proxy_which_then_has_the_port() -> None:
    """New connections, with and without a body, in chunks, and a stream that goes on after it."""
    chunked = b"POST /v1/raw HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    chunked += b"Expect: 100-continue\r\nConnection: keep-alive\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
    proxy = Proxy()
    async with open_room() as made, asking() as client:
        work = [
            asyncio.ensure_future(client.post(f"{made.url}/v1/completions", json={"n": number}))
            for number in range(3)
        ]
        work.append(asyncio.ensure_future(client.get(f"{made.url}/v1/models")))
        in_chunks = asyncio.ensure_future(raw(made.port, chunked))
        stream = asyncio.ensure_future(client.post(f"{made.url}/v1/stream", json={"n": 9}))
        await begun(made, 6)
        async with proxy.listening(made.port):
            made.tell("SIGUSR2")
            counts = await made.counts()
            answers = await asyncio.gather(*work)
            assert [a.text for a in answers[:3]] == [f'first {{"n":{n}}}' for n in range(3)]
            assert answers[3].text == "first "
            assert all(a.headers.get(program.HEADER) is None for a in answers)
            assert b"4\r\nbody\r\n0\r\n" in await in_chunks
            assert (await in_chunks).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
            # It has the port: its connections stay open, as the room's never do.
            direct = await client.get(f"{made.url}/v1/models")
            assert b"keep-alive" in proxy.heads[-1].lower()
            assert direct.text == "first "
            assert made.process.returncode is None, "a stream is under way"
            proxy.go_on.set()
            assert (await stream).text == 'first {"n":9}'
            assert await made.ended() == 0
    assert all(b"connection: close" in head.lower() for head in proxy.heads[:-1])
    assert not any(b"expect" in head.lower() for head in proxy.heads)
    assert counts["held"] == 6
    assert counts["refused"] == counts["left"] == 0
    assert counts["longest"] > 0


TOO_MUCH = [
    (f"POST / HTTP/1.1\r\nContent-Length: {program.MOST_BYTES + 1}\r\n\r\n", 503),
    ("POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400),
    ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", 400),
    ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n7fffffff\r\n", 503),
    ("hello\r\n\r\n", 400),
    (f"GET / HTTP/1.1\r\nX: {'x' * program.HEAD_BYTES}\r\n\r\n", 431),
]


async def test_who_can_not_be_held_or_not_for_longer_is_told() -> None:
    """In the form of OpenAI's API; who asks for health, too, but counts as no request."""
    async with open_room(hold=0.1) as made, asking() as client:
        for path in ("/health", "/omni_proxy/health", "/readiness", "/metrics?x=1"):
            assert (await client.get(made.url + path)).status_code == 503
        head = await client.head(f"{made.url}/health")
        assert (head.status_code, head.content) == (503, b"")
        for request, status in TOO_MUCH:
            told = await raw(made.port, request.encode())
            assert told.startswith(b"HTTP/1.1 %d " % status), request[:80]
            assert b"retry-after" in told.lower() or status != 503
        answer = await client.post(f"{made.url}/v1/completions", json={})
        made.tell("SIGTERM")
        counts = await made.counts()
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} == error.keys()
    assert error["type"] == "server_error"
    assert (counts["held"], counts["refused"]) == (1, 3)


async def test_what_connections_may_do_besides_waiting_for_an_answer() -> None:
    """Who goes away is not asked for. Of requests that come together the first is answered: the
    others are sent again, as always when a connection is closed. Who has not asked yet, may."""
    request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    proxy = Proxy()
    async with open_room() as made:
        _, leaving = await asyncio.open_connection(HERE, made.port)
        leaving.write(request)
        await begun(made, 1)
        leaving.close()
        await begun(made, 0)
        several = asyncio.ensure_future(raw(made.port, request * 2))
        reader, idle = await asyncio.open_connection(HERE, made.port)
        await begun(made, 1)
        async with proxy.listening(made.port):
            made.tell("SIGUSR2")
            counts = await made.counts()
            idle.write(request)
            assert b"200 OK" in await asyncio.wait_for(reader.read(), PATIENCE_S)
            idle.close()
            assert (await several).count(b"200 OK") == 1
            assert await made.ended() == 0
    assert (counts["held"], counts["left"]) == (2, 1)
    assert len(proxy.heads) == 2


async def test_a_proxy_that_shares_its_port_gives_new_clients_to_the_room_at_once() -> None:
    """While it still listens: so there is no moment in which a connection is refused."""
    old = Proxy()
    made_port = free_port()
    async with old.listening(made_port), room(port=made_port) as made, asking() as client:
        assert (await client.get(f"{made.url}/health")).status_code == 200
        await client.aclose()
        made.tell("SIGUSR1")
        async with asyncio.timeout(PATIENCE_S), asking() as other:
            while (await other.get(f"{made.url}/health")).status_code == 200:
                await other.aclose()
                other = asking()  # noqa: PLW2901
        assert await raw(made.port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")


async def test_a_proxy_that_does_not_share_its_port_finds_it_free() -> None:
    """The old one is followed as soon as it lets go, and the new one preceded."""
    port = free_port()
    old = socket.create_server(("", port))
    async with room(port=port) as made, asking() as client:
        made.tell("SIGUSR1")
        old.close()
        await until_connected(port)
        asked = asyncio.ensure_future(client.get(f"{made.url}/v1/models"))
        await begun(made, 1)
        made.tell("SIGHUP")
        assert (await made.counts())["held"] == 1
        proxy = Proxy()
        async with proxy.listening(port, shares_port=False):
            assert (await asked).text == "first "
            assert await made.ended() == 0


@pytest.mark.parametrize("end", ["told", "nobody leads it"])
async def test_it_never_keeps_a_port_that_nobody_asks_it_to_keep(end: str) -> None:
    """Those who wait are told, and it is gone."""
    lasts = 60 if end == "told" else 0.5
    async with open_room(lasts=lasts) as made, asking() as client:
        asked = asyncio.ensure_future(client.get(f"{made.url}/v1/models"))
        await begun(made, 1)
        if end == "told":
            made.tell("SIGTERM")
        assert (await asked).status_code == 503
        assert (await made.counts())["refused"] == 0, "counted before they were told"
        assert await made.ended() == 0
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection(HERE, made.port)


def test_it_listens_at_each_address_of_the_host_but_not_at_the_smoke_tests() -> None:
    """Which is none that a host has by itself."""
    addresses = program.own_addresses()
    assert HERE in addresses
    assert "127.77.0.1" not in addresses
    assert "0.0.0.0" not in addresses
