"""What has the port of a router that can't share one: a relay, which shares the port with waiting
rooms and other relays, and passes connections on to the router at a port of the loopback.

Signals lead it: SIGUSR1 has it listen where clients ask, and not just where the smoke test does;
SIGTERM has it leave its port, then has the router end once all who were connected have reached it,
and ends when they have their answers. Its source is sent to whatever Python the image has, so it
needs no more than the standard library of 3.9.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys

LINGER_S = 0.5  # for a client to read an answer; a connection closed with data unread is reset


class End(asyncio.Protocol):
    """One end of a connection that is passed on; the other one gets all that comes here."""

    transport: asyncio.Transport
    other: End

    def __init__(self) -> None:
        self.gone = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def eof_received(self) -> bool:
        self.other.end()
        return True

    def end(self) -> None:
        """Say that nothing more will come from the other end."""
        if not self.transport.is_closing():
            self.transport.write_eof()

    def pause_writing(self) -> None:
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set_result(None)
        self.other.transport.close()


class OfRouter(End):
    """The router's end: what it closes is over, though an idle client may keep its end for long."""

    def eof_received(self) -> bool:
        super().eof_received()
        asyncio.get_running_loop().call_later(LINGER_S, self.other.transport.close)
        return True


class Relay:
    """What passes connections on.

    Args:
        port: where it listens.
        router: address and port of the router.
        router_pid: its process.
    """

    def __init__(self, port: int, router: tuple[str, int], router_pid: int) -> None:
        self._port, self._router, self._router_pid = port, router, router_pid
        self._listeners: list[socket.socket] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._passing: set[asyncio.Future[None]] = set()

    async def run(self, proving: str, clients: str) -> None:
        """Do all of it, from the smoke test's first request to the last answer."""
        opened, ending = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, opened.set)
        loop.add_signal_handler(signal.SIGTERM, ending.set)
        self._listen(proving)
        opening = asyncio.ensure_future(opened.wait())
        end = asyncio.ensure_future(ending.wait())
        await asyncio.wait({opening, end}, return_when=asyncio.FIRST_COMPLETED)
        if not end.done():
            self._listen(clients)
        await end
        self._leave()
        while self._connecting:
            await asyncio.wait(set(self._connecting))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._router_pid, signal.SIGTERM)
        while self._passing:
            await asyncio.wait(set(self._passing))

    def _listen(self, address: str) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setblocking(False)
        listener.bind((address, self._port))
        listener.listen(4096)
        self._listeners.append(listener)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _leave(self) -> None:
        """Take those who are connected already, and leave the port."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            self._accept(listener)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setblocking(False)
            task = asyncio.ensure_future(self._pass_on(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _pass_on(self, connection: socket.socket) -> None:
        """Connect a client with the router; one that is not there is as good as a closed port."""
        loop = asyncio.get_running_loop()
        try:
            to_router, of_router = await loop.create_connection(OfRouter, *self._router)
        except OSError:
            connection.close()
            return
        to_router.pause_reading()
        of_client = End()
        of_client.other, of_router.other = of_router, of_client
        await loop.connect_accepted_socket(lambda: of_client, connection)
        to_router.resume_reading()
        for end in (of_client, of_router):
            self._passing.add(end.gone)
            end.gone.add_done_callback(self._passing.discard)


def free_port(address: str) -> int:
    """Return a port of an address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Name a free port of an address, or pass connections on."""
    if sys.argv[1] == "port":
        print(free_port(sys.argv[2]))
        return
    port, inner, router_pid = map(int, sys.argv[4:])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    proving, clients = sys.argv[2:4]
    asyncio.run(Relay(port, (proving, inner), router_pid).run(proving, clients))


if __name__ == "__main__":
    main()
