"""Requests to a port of a host, through an SSH server in this process: what the service does is
told from what becomes of the way to it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncssh
import httpx
import pytest

from pd_deploy.errors import ConnectionDropped, HostUnreachable, is_transient
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.login import Login

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server(asyncssh.SSHServer):
    """An SSH server that lets everybody in and forwards."""

    def __init__(self, way: "Way") -> None:
        self._way = way

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._way.connections.append(conn)

    def begin_auth(self, username: str) -> bool:
        return False

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        return True


class Way:
    """The way to a service: an SSH server that can be cut off."""

    def __init__(self) -> None:
        self.connections: list[asyncssh.SSHServerConnection] = []
        self.listener: asyncssh.SSHAcceptor | None = None

    def cut(self, *, for_good: bool = False) -> None:
        if for_good and self.listener:
            self.listener.close()
        for connection in self.connections:
            connection.abort()


@pytest.fixture(autouse=True)
def proxies_that_answer_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request to a host goes through them."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")


@pytest.fixture
async def way() -> AsyncIterator[Way]:
    way = Way()
    way.listener = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: Server(way),
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
    )
    yield way
    way.cut(for_good=True)


@asynccontextmanager
async def client_of(way: Way, port: int) -> AsyncIterator[httpx.AsyncClient]:
    assert way.listener
    port_of_ssh = way.listener.get_port()
    login = Login("root", port_of_ssh, password="x", known_hosts="", trust_on_first_use=True)
    host = Host("a", "127.0.0.1", login)
    async with host.http("127.0.0.1", port) as client:
        yield client
    await host.aclose()


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        writer.write(ANSWER)


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def hangs_up_within(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER[:-1])
    writer.close()


async def get(client: httpx.AsyncClient, port: int) -> str:
    return (await client.get(f"http://127.0.0.1:{port}/", timeout=20)).text


async def test_an_answer_comes_as_a_stream(way: Way) -> None:
    """A reader that bounds what it takes never has more than that in memory."""
    rest = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER[:-1])
        await rest.wait()
        writer.write(ANSWER[-1:])

    async with (
        listening(serve) as port,
        client_of(way, port) as client,
        client.stream("GET", f"http://127.0.0.1:{port}/", timeout=20) as response,
    ):
        chunks = response.aiter_raw()
        assert await anext(chunks) == b"o"
        rest.set()
        assert b"".join([chunk async for chunk in chunks]) == b"k"


@pytest.mark.parametrize("serve", [hangs_up, hangs_up_within])
async def test_a_server_that_hangs_up_is_told_as_the_servers_fault(way: Way, serve: Serve) -> None:
    async with listening(serve) as port, client_of(way, port) as client:
        with pytest.raises(httpx.TransportError):
            await get(client, port)


async def test_a_port_that_nobody_listens_at_is_told_as_the_servers_fault(way: Way) -> None:
    async with listening(answers) as port:
        pass
    async with client_of(way, port) as client:
        with pytest.raises(httpx.TransportError):
            await get(client, port)


@pytest.mark.parametrize("sent", [b"", ANSWER[:-1]], ids=["before the answer", "within it"])
async def test_a_connection_that_drops_is_a_fault_of_the_way_and_the_next_request_works(
    way: Way, sent: bytes
) -> None:
    drops = [True]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if drops:
            drops.clear()
            await reader.readuntil(b"\r\n\r\n")
            writer.write(sent)
            await writer.drain()
            way.cut()
        else:
            await answers(reader, writer)

    async with listening(serve) as port, client_of(way, port) as client:
        with pytest.raises(ConnectionDropped, match=f"during a request to port {port}"):
            await get(client, port)
        assert await get(client, port) == "ok"


async def test_after_a_dropped_connection_a_server_that_hangs_up_is_to_blame_again(
    way: Way,
) -> None:
    cuts = [True]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if cuts:
            cuts.clear()
            way.cut()
        else:
            writer.close()

    async with listening(serve) as port, client_of(way, port) as client:
        with pytest.raises(ConnectionDropped):
            await get(client, port)
        with pytest.raises(httpx.TransportError):
            await get(client, port)


async def test_a_host_that_is_gone_is_a_fault_of_the_way(way: Way) -> None:
    async with listening(answers) as port, client_of(way, port) as client:
        assert await get(client, port) == "ok"
        way.cut(for_good=True)
        with pytest.raises((HostUnreachable, ConnectionDropped)) as raised:
            await get(client, port)
        assert is_transient(raised.value)
