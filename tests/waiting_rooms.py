"""A waiting room's program, run by itself and told what to do by signals."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pd_deploy.cli.local_http import free_port
from pd_deploy.steps import waiting_room_program as program

HERE = "127.0.0.1"
SOURCE = program.__file__
PATIENCE_S = 20


class Room:
    """A waiting room of a port, which is told what to do by signals."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://{HERE}:{port}"

    def tell(self, name: str) -> None:
        self.process.send_signal(getattr(signal, name))

    async def line(self) -> str:
        assert self.process.stdout
        return (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE_S)).decode()

    async def counts(self) -> dict[str, Any]:
        """What it says when it has left the port."""
        counts: dict[str, Any] = json.loads(await self.says(program.CLOSED))
        return counts

    async def takes_port(self) -> None:
        """Have it take the port, and wait until it has it, or tries to."""
        self.tell("SIGUSR1")
        await self.says(program.TAKING)

    async def says(self, text: str) -> str:
        """Wait for a line that begins so; return the rest of it."""
        while not (line := await self.line()).startswith(text):
            assert line, f"ended before it said {text!r}"
        return line.removeprefix(text)

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)


@asynccontextmanager
async def room(**options: Any) -> AsyncIterator[Room]:
    """A room that is ready, and has not been told to take its port."""
    defaults = {"port": free_port(), "proxy": HERE, "hold": 30, "lasts": 60}
    given = {**defaults, "addresses": [HERE], **options}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-IS", SOURCE, json.dumps(given), stdout=asyncio.subprocess.PIPE
    )
    made = Room(process, given["port"])
    try:
        assert await made.line() == f"{program.READY}\n"
        yield made
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def open_room(**options: Any) -> AsyncIterator[Room]:
    """A room that has its port."""
    async with room(**options) as made:
        await made.takes_port()
        yield made


async def until_connected(port: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(HERE, port)
            except OSError:
                await asyncio.sleep(0.002)
            else:
                writer.close()
                return


async def begun(made: Room, count: int) -> None:
    """Wait until so many requests wait, as the room itself says."""
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    async with asyncio.timeout(PATIENCE_S):
        while f"Requests that wait: {count}.".encode() not in await raw(made.port, health):
            pass


async def raw(port: int, data: bytes) -> bytes:
    """All that comes back for some bytes, until the connection is closed."""
    reader, writer = await asyncio.open_connection(HERE, port)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    return answer
