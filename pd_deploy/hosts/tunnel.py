"""A local UNIX socket whose connections go to a host."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import asyncssh

from pd_deploy.errors import PdDeployError
from pd_deploy.hosts.scratch import Scratch

SOCKET = "engine.sock"
CHUNK = 65536  # bytes; more than an SSH packet carries


class Reader(Protocol):
    """Where bytes come from."""

    async def read(self, n: int = -1, /) -> bytes:
        """Up to `n` bytes; none at the end."""
        ...


class Writer(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> None:
        """Queue bytes."""
        ...

    async def drain(self) -> None:
        """Wait until the queue has room."""
        ...

    def close(self) -> None:
        """End the stream."""
        ...


Stream = tuple[Reader, Writer]
OpenStream = Callable[[], AbstractAsyncContextManager[Stream]]


class Tunnel:
    """A UNIX socket in a directory only this user can enter.

    Each connection to it is joined to a stream of its own, opened on demand; so it outlives the
    SSH connections that carry the streams.

    Args:
        open_stream: opens the far end of one connection; raises ConnectionRefusedError where nobody
            listens, else what keeps it from the host, also when the way there is lost later.
    """

    def __init__(self, open_stream: OpenStream) -> None:
        self._open_stream = open_stream
        self._server: asyncio.Server | None = None
        self._scratch: Scratch | None = None
        self._joined: set[asyncio.Task[None]] = set()
        self.fault: PdDeployError | None = None
        """What kept the last connection from its far end, or cut it off; None if that closed it."""

    def broken(self) -> PdDeployError | None:
        """Make an error of the fault, a new one each time: several calls may fail for it."""
        fault = self.fault
        return fault and type(fault)(fault.message, host=fault.host, hint=fault.hint)

    async def start(self) -> str:
        """Listen; return the socket's path."""
        # Nobody else may enter: the socket gives root on the host to whoever can connect.
        self._scratch = Scratch(SOCKET)
        path = self._scratch.path / SOCKET
        self._server = await asyncio.start_unix_server(self._accept, path)
        return str(path)

    async def aclose(self) -> None:
        """Cut all connections and remove the socket; safe to call twice."""
        if self._server:
            self._server.close()
        for task in self._joined:
            task.cancel()
        if self._scratch:
            self._scratch.close()
        await asyncio.gather(*self._joined, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._join(reader, writer))
        self._joined.add(task)
        task.add_done_callback(self._joined.discard)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._open_stream() as (far_reader, far_writer):
                self.fault = None
                await _first(_pump(reader, far_writer), _pump(far_reader, writer))
        except ConnectionRefusedError:
            self.fault = None
        except PdDeployError as exc:
            self.fault = exc
        finally:
            writer.close()


async def _first(*ways: Awaitable[None]) -> None:
    """Until one end is through: the Docker API's clients never close one direction alone."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: Reader, sink: Writer) -> None:
    with contextlib.suppress(OSError, asyncssh.Error):
        while data := await source.read(CHUNK):
            sink.write(data)
            await sink.drain()
