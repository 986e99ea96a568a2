"""What SGLang's router is to a client, without servers: it takes its port alone, answers over
connections that stay open, and when told to stop lets those under way have their answers."""

import argparse
import asyncio
import json
import signal

TOKEN_S = 0.05
ANSWER = {"choices": [{"text": "the answer"}]}
EVENT = f"data: {json.dumps(ANSWER)}\n\n".encode()


class Router:
    """Serves until it is told to stop."""

    def __init__(self, servers: int) -> None:
        self._readiness = {"status": "ready", "healthy_workers": servers}
        self._idle: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    async def run(self, host: str, port: int) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopping.set)
        server = await asyncio.start_server(self._serve, host, port)
        await self._stopping.wait()
        server.close()
        for task in self._idle:
            task.cancel()
        while self._connections:
            await asyncio.wait(set(self._connections))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        try:
            while not self._stopping.is_set():
                self._idle.add(task)
                head = await reader.readuntil(b"\r\n\r\n")
                self._idle.discard(task)
                await self._answer(head, reader, writer)
                if b"HTTP/1.0" in head or b"connection: close" in head.lower():
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            self._idle.discard(task)
            self._connections.discard(task)
            writer.close()

    async def _answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        fields = dict(
            line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line
        )
        body = await reader.readexactly(int(fields.get(b"content-length", 0)))
        if b"/readiness" in head.split(b"\r\n")[0]:
            parts = [json.dumps(self._readiness).encode()]
        elif body and json.loads(body).get("stream"):
            parts = [EVENT, EVENT, EVENT, b"data: [DONE]\n\n"]
        else:
            parts = [json.dumps(ANSWER).encode()]
        length = sum(map(len, parts))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
        for part in parts:
            writer.write(part)
            await writer.drain()
            if len(parts) > 1:
                await asyncio.sleep(TOKEN_S)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", nargs="+", action="append", default=[])
    parser.add_argument("--decode", nargs="+", action="append", default=[])
    options, _ = parser.parse_known_args()
    asyncio.run(_serve(options))


async def _serve(options: argparse.Namespace) -> None:
    servers = len(options.prefill) + len(options.decode)
    await Router(servers).run(options.host, options.port)


if __name__ == "__main__":
    main()
