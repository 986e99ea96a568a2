"""What runs in a waiting room: it takes requests at the proxy's port while no proxy serves, holds
them, and forwards them to the new proxy once that is open.

Signals lead it: SIGUSR1 has it take the port as soon as the old proxy lets go of it. SIGUSR2 has it
leave the port to the new proxy once that listens there, too, SIGHUP at once, for a proxy that can't
listen before. SIGTERM has it turn everybody away and end. Its source is sent to whatever Python the
image has, so it needs no more than the standard library of 3.9.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGTERM")
READY = "pd-deploy: waiting room ready"
TAKING = "pd-deploy: waiting room takes the port"
"""What it says once it has the port, where the old proxy shares it, or is about to take it."""
CLOSED = "pd-deploy: waiting room closed "
"""What it says once it has left the port; the counts follow."""
HEADER = "X-Pd-Deploy"
"""A field of all that it answers by itself, so that nobody takes it for a proxy."""

LATER = "The service is being updated. Please try again."
FULL = "The service is being updated, and too many requests are waiting. Please try again."
HEALTH = {"health", "healthz", "live", "liveness", "livez", "metrics", "ping", "readiness", "ready",
          "readyz"}  # fmt: skip
MOST_REQUESTS = 2000  # at once; each takes two connections while it is forwarded
MOST_CONNECTIONS = 8000
MOST_BYTES = 512 << 20  # of all bodies together
HEAD_BYTES = 512 << 10  # as nginx is configured
PART_BYTES = 64 << 10
BIND_EVERY_S = 0.003  # from when the old proxy lets go of the port to then, clients are refused
TRY_AGAIN_S = 0.1
RETRY_AFTER_S = 5
IDLE_S = 75  # as nginx keeps connections
BODY_S = 60
OPENS_S = 30  # the new proxy, from when it was told to
LINGER_S = 2  # for what comes on connections that were idle, and for clients to read an answer
FORWARDING_S = 3600  # for answers to requests that were held


class Refused(Exception):
    """A request that can't be held: with which status, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Request:
    """A request as it came."""

    def __init__(self, head: bytes) -> None:
        first, *fields = head.rstrip(b"\r\n").split(b"\r\n")
        words = first.split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            raise Refused(400, "expected a request of HTTP/1")
        self.method, self.path = words[0].decode("latin-1"), words[1].decode("latin-1")
        self._first, self._fields, self.body = first, fields, b""
        self.reserved = 0

    def field(self, name: str) -> str:
        """Return the value of a field of the head; "" without it."""
        for line in self._fields:
            key, _, value = line.partition(b":")
            if key.strip().lower().decode("latin-1") == name:
                return value.strip().decode("latin-1")
        return ""

    @property
    def asks_for_health(self) -> bool:
        """Whether it wants to know how the service is, and not an answer of it."""
        last = self.path.partition("?")[0].rstrip("/").rpartition("/")[2]
        return self.method in ("GET", "HEAD") and last in HEALTH

    def forwarded(self) -> bytes:
        """Write it for the proxy: on a connection of its own, with all of the body at once."""
        dropped = (b"connection", b"keep-alive", b"proxy-connection", b"expect")
        kept = [f for f in self._fields if f.partition(b":")[0].strip().lower() not in dropped]
        return b"\r\n".join([self._first, *kept, b"Connection: close", b"", b""]) + self.body


class WaitingRoom:
    """What holds requests.

    Args:
        port: the proxy's.
        proxy: the address at which the new proxy will answer.
        hold: seconds that a request may wait.
        lasts: seconds after which it gives up by itself, because nobody leads it any more.
        addresses: where to listen; by default at all addresses of the host, each by itself, as the
            smoke test's own has to stay free.
    """

    def __init__(
        self,
        port: int,
        proxy: str,
        hold: float,
        lasts: float,
        addresses: list[str] | None = None,
    ) -> None:
        self._port, self._proxy, self._hold = port, proxy, hold
        self._lasts = lasts
        self._addresses = own_addresses() if addresses is None else addresses
        self._told = {name: asyncio.Event() for name in SIGNALS}
        # Done when the wait is over: with whether the new proxy is there.
        self._over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._listeners: dict[str, socket.socket] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[None]] = set()
        self._requests = self._bytes = 0
        self._waits: dict[Request, float] = {}  # since when each waits
        self.counts = {"held": 0, "refused": 0, "left": 0, "longest": 0.0}

    async def run(self) -> None:
        """Do all of it, from the first signal to the last answer."""
        for name, event in self._told.items():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(getattr(signal, name), event.set)
        say(READY)
        taking = asyncio.ensure_future(self._take())
        sharing = asyncio.ensure_future(self._told["SIGUSR2"].wait())
        leaving = asyncio.ensure_future(self._told["SIGHUP"].wait())
        ending = asyncio.ensure_future(self._told["SIGTERM"].wait())
        await first_of(sharing, leaving, ending, seconds=self._lasts)
        if sharing.done():
            await first_of(self._until_proxy_listens(), leaving, ending, seconds=OPENS_S)
        taking.cancel()
        self._leave()
        self._note_longest()
        self._over.set_result((sharing.done() or leaving.done()) and not ending.done())
        say(CLOSED + json.dumps(self.counts))
        await self._let_finish(ending)

    async def _take(self) -> None:
        """Listen wherever the old proxy has let go of the port, from the first signal on."""
        await self._told["SIGUSR1"].wait()
        self._listen()
        say(TAKING)
        while len(self._listeners) < len(self._addresses):
            await asyncio.sleep(TRY_AGAIN_S if self._listeners else BIND_EVERY_S)
            self._listen()

    def _listen(self) -> None:
        for address in self._addresses:
            if address in self._listeners:
                continue
            if listener := listening(address, self._port):
                self._listeners[address] = listener
                asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _until_proxy_listens(self) -> None:
        while not listens_anywhere(self._port):  # noqa: ASYNC110
            await asyncio.sleep(BIND_EVERY_S)

    def _leave(self) -> None:
        """Take those who are connected already, and leave the port."""
        for listener in self._listeners.values():
            asyncio.get_running_loop().remove_reader(listener)
            self._accept(listener)
            listener.close()

    async def _let_finish(self, ending: asyncio.Task[object]) -> None:
        """Let clients have their answers."""
        await first_of(self._all_answered(), ending, seconds=LINGER_S)
        for task in list(self._idle):
            task.cancel()
        await first_of(self._all_answered(), ending, seconds=FORWARDING_S)
        await first_of(self._all_answered(), seconds=LINGER_S)

    async def _all_answered(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _accept(self, listener: socket.socket) -> None:
        """Take all who are waiting to be connected."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if len(self._tasks) >= MOST_CONNECTIONS:
                connection.close()
                continue
            connection.setblocking(False)
            task = asyncio.ensure_future(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(self._idle.discard)

    async def _serve(self, connection: socket.socket) -> None:
        """Answer one request, and close the connection: the next one is to reach the proxy."""
        reader, writer = await asyncio.open_connection(sock=connection, limit=HEAD_BYTES)
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):  # noqa: UP041
            pass  # the client is gone, or says nothing
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._idle.add(task)
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE_S)
            self._idle.discard(task)
            request = Request(head)
            if request.asks_for_health:
                why = f"The service is being updated. Requests that wait: {len(self._waits)}."
                await say_no(writer, 503, why, request.method)
            else:
                await self._hold_and_forward(request, reader, writer)
        except asyncio.LimitOverrunError:
            await say_no(writer, 431, "The head of the request is too long.")
            await linger(reader, writer)
        except Refused as no:
            self.counts["refused"] += no.status == 503
            await say_no(writer, no.status, str(no))
            await linger(reader, writer)

    async def _hold_and_forward(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Let a request wait, at most for its time, and pass the proxy's answer on."""
        if self._requests >= MOST_REQUESTS:
            raise Refused(503, FULL)
        began = time.monotonic()
        self._requests += 1
        try:
            reading = self._body(request, reader, writer)
            request.body = await asyncio.wait_for(reading, BODY_S)
            self.counts["held"] += 1
            leaves = asyncio.ensure_future(until_gone(reader))
            try:
                await self._wait(request, began, leaves)
                if leaves.done():
                    self.counts["left"] += 1
                elif self._over.done() and self._over.result():
                    await first_of(self._forward(request, writer), leaves)
                else:
                    raise Refused(503, LATER)
            finally:
                leaves.cancel()
                await asyncio.wait({leaves})
        finally:
            self._requests -= 1
            self._bytes -= request.reserved

    async def _wait(self, request: Request, began: float, leaves: asyncio.Task[None]) -> None:
        """Wait until the proxy is there, the client is gone, or time is up."""
        self._waits[request] = began
        left = max(began + self._hold - time.monotonic(), 0)
        waits: set[asyncio.Future[Any]] = {leaves, self._over}
        await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        self._note_longest()
        del self._waits[request]

    def _note_longest(self) -> None:
        longest = time.monotonic() - min(self._waits.values(), default=math.inf)
        self.counts["longest"] = round(max(self.counts["longest"], longest), 3)

    async def _body(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        """Read a body, if there is room for it."""
        length = request.field("content-length") or "0"
        if not length.isdecimal():
            raise Refused(400, "expected a number as Content-Length")
        chunked = "chunked" in request.field("transfer-encoding").lower()
        if not chunked:
            self._reserve(request, int(length))
        if (chunked or int(length)) and "100-continue" in request.field("expect").lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await (self._chunks(request, reader) if chunked else reader.readexactly(int(length)))

    async def _chunks(self, request: Request, reader: asyncio.StreamReader) -> bytes:
        """Read a body in chunks, as it is; the last one is empty, and fields may follow."""
        parts = []
        size = -1
        while size:
            parts.append(await reader.readuntil(b"\r\n"))
            digits = parts[-1].split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", digits):
                raise Refused(400, "expected a chunk's size")
            size = int(digits, 16)
            self._reserve(request, len(parts[-1]) + size)
            if size:
                parts.append(await reader.readexactly(size + 2))
        while parts[-1] != b"\r\n":
            parts.append(await reader.readuntil(b"\r\n"))
            self._reserve(request, len(parts[-1]))
        return b"".join(parts)

    def _reserve(self, request: Request, count: int) -> None:
        if self._bytes + count > MOST_BYTES:
            raise Refused(503, FULL)
        self._bytes += count
        request.reserved += count

    async def _forward(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """Ask the new proxy, as soon as it answers, and pass on what it says as it comes."""
        until = time.monotonic() + OPENS_S
        while True:
            with contextlib.suppress(OSError):
                from_proxy, to_proxy = await asyncio.open_connection(self._proxy, self._port)
                # A port of the range for clients can connect to itself while nobody listens.
                names = [to_proxy.get_extra_info(name) for name in ("sockname", "peername")]
                if names[0] != names[1]:
                    break
                to_proxy.close()
            if time.monotonic() > until:
                raise Refused(503, LATER)
            await asyncio.sleep(0.02)
        answered = False
        try:
            to_proxy.write(request.forwarded())
            with contextlib.suppress(ConnectionError):
                await to_proxy.drain()
                while part := await from_proxy.read(PART_BYTES):
                    answered = True
                    writer.write(part)
                    await writer.drain()
            if not answered:
                raise Refused(503, "The service did not answer. Please try again.")
        finally:
            to_proxy.close()


def own_addresses() -> list[str]:
    """List the host's own IPv4 addresses."""
    addresses: dict[str, None] = {}
    address = ""
    for line in Path("/proc/net/fib_trie").read_text().splitlines():
        if leaf := re.search(r"\|-- ([\d.]+)", line):
            address = leaf[1]
        elif "/32 host LOCAL" in line:
            addresses[address] = None
    return list(addresses)


def listening(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens; None while somebody else has the port."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # nginx shares its port; the kernel prefers who listens at an address to who does at all.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setblocking(False)
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        return None
    return listener


def listens_anywhere(port: int) -> bool:
    """Tell whether somebody listens on a port at all addresses."""
    wanted = re.compile(rf"\s*\d+: 0+:{port:04X} \S+ 0A ")
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError), table.open() as lines:
            next(lines)
            # Those that listen come first, and of others there may be many.
            listeners = itertools.takewhile(lambda line: line.split()[3] == "0A", lines)
            if any(map(wanted.match, listeners)):
                return True
    return False


async def first_of(*work: Awaitable[object], seconds: float | None = None) -> None:
    """Wait until the first of several is done, or time is up; end those that were begun here."""
    tasks = {asyncio.ensure_future(each): each for each in work}
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task, given in tasks.items():
            if task is not given:
                task.cancel()


async def until_gone(reader: asyncio.StreamReader) -> None:
    """Wait until a client is gone; what it sends beyond its request is dropped."""
    with contextlib.suppress(OSError):
        while await reader.read(PART_BYTES):
            pass


async def say_no(writer: asyncio.StreamWriter, status: int, why: str, method: str = "") -> None:
    """Answer with an error in the form of OpenAI's API."""
    reason = {400: "Bad Request", 431: "Request Header Fields Too Large"}
    kind = "server_error" if status == 503 else "invalid_request_error"
    error = {"message": why, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    lines = [
        f"HTTP/1.1 {status} {reason.get(status, 'Service Unavailable')}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *([f"Retry-After: {RETRY_AFTER_S}"] if status == 503 else []),
        f"{HEADER}: waiting room",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    head = "".join(f"{line}\r\n" for line in [*lines, ""]).encode()
    writer.write(head + (b"" if method == "HEAD" else body))
    await writer.drain()


async def linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let a client read its answer: a connection closed with its request unread is reset."""
    with contextlib.suppress(OSError):
        writer.write_eof()
        await first_of(until_gone(reader), seconds=LINGER_S)


def say(line: str) -> None:
    """Write a line to the container's log."""
    print(line, flush=True)


async def main() -> None:
    """Run the room that the argument describes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    await WaitingRoom(**json.loads(sys.argv[1])).run()


if __name__ == "__main__":
    asyncio.run(main())
