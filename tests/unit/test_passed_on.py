"""What the relay and the waiting room pass on, byte for byte, over real sockets."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pd_deploy.cli.local_http import free_port
from pd_deploy.engines import relay_program
from tests.waiting_rooms import HERE, PATIENCE_S, begun, open_room, until_connected

LARGE = os.urandom(3 << 20)  # more than sockets and transports hold
OK = b"HTTP/1.1 200 OK\r\n"
SHORT = OK + b"Content-Length: 2\r\n\r\nok"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# The relay closes a client's end at once when the router has closed its own, and not after a while:
# what is still to be sent has to be sent all the same.
AT_ONCE = Path(relay_program.__file__).read_text().replace("LINGER_S = 0.5", "LINGER_S = 0.0")


@dataclass(frozen=True)
class Exchange:
    """A request, and its answer in parts, each of which is sent when the client has the one before.

    Attributes:
        fields: of the request's head, beside those that all have.
        times: how often the request is sent, before an answer comes.
        closes: whether the router closes the connection after its answer.
        half: whether the client has closed its half before.
        held: whether the waiting room passes all of it on.
    """

    fields: bytes = b"Content-Length: 4\r\n"
    body: bytes = b"body"
    answer: Sequence[bytes] = (SHORT,)
    times: int = 1
    closes: bool = False
    half: bool = False
    held: bool = True

    def request(self, name: str, connection: bytes) -> bytes:
        """All of the request, in bytes; its path is the exchange's name."""
        head = b"POST /%s HTTP/1.1\r\nHost: x\r\nX-Odd:  \xe9\r\n" % name.encode()
        return (
            head + self.fields + b"Connection: %s\r\n\r\n" % connection + self.body
        ) * self.times


EXCHANGES = {
    "short": Exchange(),
    "interim": Exchange(answer=(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", SHORT)),
    "stream": Exchange(answer=(CHUNKED, *[b"6\r\ndata: \r\n"] * 5, b"0\r\n\r\n")),
    "trailers": Exchange(
        b"Transfer-Encoding: chunked\r\n",
        b"2;a=b\r\nbo\r\n2\r\ndy\r\n0\r\nX-Sum: 1\r\n\r\n",
        (CHUNKED + b"2\r\nok\r\n0\r\nX-Sum: 2\r\n\r\n",),
    ),
    "large": Exchange(
        b"Content-Length: %d\r\n" % len(LARGE),
        LARGE,
        (OK + b"Content-Length: %d\r\n\r\n" % len(LARGE) + LARGE,),
    ),
    "until-closed": Exchange(answer=(OK + b"\r\n" + LARGE,), closes=True),
    "cut": Exchange(answer=(CHUNKED + b"6\r\ndata",), closes=True),
    # The waiting room takes such a client for one that is gone, as nginx does; it answers the first
    # of several requests; and it says so where there was no answer.
    "half-closed": Exchange(half=True, closes=True, held=False),
    "several": Exchange(times=3, answer=(SHORT * 2, SHORT), held=False),
    "none": Exchange(answer=(), closes=True, held=False),
}


class Passing:
    """Clients and a router that know what each is to get, with something between them.

    Args:
        names: the exchanges.
        received: the field `Connection` of what the router gets.
    """

    def __init__(self, names: Iterable[str], received: bytes) -> None:
        self._names, self._received = [*names], received
        self._has = {n: [asyncio.Event() for _ in EXCHANGES[n].answer] for n in self._names}
        self.got = dict[str, bytes]()

    async def ask(self, port: int) -> None:
        """Make all exchanges at the same time."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(self._ask(name, port) for name in self._names))

    async def _ask(self, name: str, port: int) -> None:
        exchange = EXCHANGES[name]
        reader, writer = await asyncio.open_connection(HERE, port)
        writer.write(exchange.request(name, b"keep-alive"))
        if exchange.half:
            writer.write_eof()
        answer = b""
        for part, has in zip(exchange.answer, self._has[name], strict=True):
            answer += await reader.readexactly(len(part))
            has.set()
        if exchange.closes:
            answer += await reader.read()
        writer.close()
        assert answer == b"".join(exchange.answer), name

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Be the router."""
        with contextlib.suppress(asyncio.IncompleteReadError):  # who only looks whether it is there
            head = await reader.readuntil(b"\r\n")
            name = head.split()[1].removeprefix(b"/").decode()
            exchange = EXCHANGES[name]
            left = len(exchange.request(name, self._received)) - len(head)
            rest = await (reader.read() if exchange.half else reader.readexactly(left))
            self.got[name] = head + rest
            for part, has in zip(exchange.answer, self._has[name], strict=True):
                writer.write(part)
                await has.wait()
            if not exchange.closes:
                assert not await reader.read()
        writer.close()

    def assert_received(self) -> None:
        """Check what reached the router."""
        for name in self._names:
            assert self.got[name] == EXCHANGES[name].request(name, self._received), name


async def test_the_relay_passes_on_what_comes_as_it_comes() -> None:
    passing, port, inner = Passing(EXCHANGES, b"keep-alive"), free_port(), free_port()
    async with await asyncio.start_server(passing.serve, HERE, inner):
        words = (HERE, HERE, str(port), str(inner), "0")
        relay = await asyncio.create_subprocess_exec(
            sys.executable, "-IS", "-c", AT_ONCE, "relay", *words
        )
        try:
            await until_connected(port)
            await passing.ask(port)
        finally:
            relay.kill()
            await relay.wait()
    passing.assert_received()


async def test_the_waiting_room_passes_on_all_but_that_connections_stay_open() -> None:
    held = [name for name, exchange in EXCHANGES.items() if exchange.held]
    passing = Passing(held, b"close")
    async with open_room() as made:
        asking = asyncio.ensure_future(passing.ask(made.port))
        await begun(made, len(held))
        async with await asyncio.start_server(passing.serve, "0.0.0.0", made.port, reuse_port=True):
            made.tell("SIGUSR2")
            await asking
    passing.assert_received()
