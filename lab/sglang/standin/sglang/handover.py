"""The way of KV: the bootstrap server and the sender of a prefill, the receiver of a decode."""

import json
import os
import select
import socket
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sglang.model import KV_BYTES, tokens_of

ATTEMPTS = 3
POLL_S = 0.02


class Refused(Exception):
    """A request that fails, with its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def own_address() -> str:
    """Return the address that a prefill announces: SGLANG_HOST_IP, or that of the default route."""
    if told := os.environ.get("SGLANG_HOST_IP"):
        return told
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def waiting_time(variable: str) -> float:
    """Return how long one side waits for the other, in seconds."""
    return float(os.environ.get(variable, "300"))


def layout(args: object) -> dict:
    """Return what has to be alike on both sides."""
    return {"page_size": args.page_size or 1, "kv_cache_dtype": args.kv_cache_dtype or "auto"}


class Bootstrap:
    """The bootstrap server of a prefill: says where its ranks are, once they have registered."""

    def __init__(self, host: str, port: int) -> None:
        self.info: dict | None = None
        bootstrap = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/health"):
                    self.say(200, b"OK")
                elif not self.path.startswith("/route?"):
                    self.say(404, b"")
                elif bootstrap.info is None:
                    self.say(503, b"Prefill server not fully registered yet")
                else:
                    self.say(200, json.dumps(bootstrap.info).encode())

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                bootstrap.info = json.loads(body)
                self.say(200, b"OK")

            def say(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer((host, port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()


class Sender:
    """A prefill's side: each room gets its KV once decode has said that it waits there."""

    def __init__(self, args: object) -> None:
        host = args.dist_init_addr.rsplit(":", 1)[0] if args.dist_init_addr else args.host
        port = args.disaggregation_bootstrap_port or 8998
        Bootstrap(args.host, port)
        self.rooms: dict[int, socket.socket] = {}
        listener = socket.create_server(("", 0))
        threading.Thread(target=self.meet, args=(listener,), daemon=True).start()
        rank = {"rank_ip": own_address(), "rank_port": listener.getsockname()[1], **layout(args)}
        request = urllib.request.Request(
            f"http://{host}:{port}/route", json.dumps(rank).encode(), method="PUT"
        )
        urllib.request.urlopen(request, timeout=5).read()  # noqa: S310

    def meet(self, listener: socket.socket) -> None:
        """Take decodes in, each with the number of its room."""
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self.enter, args=(connection,), daemon=True).start()

    def enter(self, connection: socket.socket) -> None:
        """Note the room in which a decode waits."""
        with connection.makefile("r") as lines:
            line = lines.readline()
        if line:
            self.rooms[json.loads(line)["room"]] = connection

    def send(self, room: int, prompt: str, gone: object) -> int:
        """Write the KV of a prompt into decode's memory; return how many bytes.

        Args:
            gone: whether the client has hung up.
        """
        deadline = time.monotonic() + waiting_time("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT")
        while room not in self.rooms:
            if gone():
                raise Refused(499, "the client has hung up")
            if time.monotonic() > deadline:
                raise Refused(500, f"KVTransferError(bootstrap_room={room}): Request timed out")
            time.sleep(POLL_S)
        kv = prompt.encode()
        padding = max(tokens_of(prompt) * KV_BYTES - len(kv), 0)
        with self.rooms.pop(room) as connection:
            connection.sendall(b"%d %d\n" % (len(kv), padding) + kv + bytes(padding))
        return len(kv) + padding


class Receiver:
    """A decode's side."""

    def __init__(self, args: object) -> None:
        self.layout = layout(args)
        self.prefills: dict[str, dict] = {}
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Forget a prefill whose bootstrap server misses two heartbeats."""
        missed: dict[str, int] = {}
        while True:
            time.sleep(float(os.environ.get("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL", "5")))
            for address in list(self.prefills):
                try:
                    urllib.request.urlopen(f"http://{address}/health", timeout=2).read()
                    missed[address] = 0
                except OSError:
                    missed[address] = missed.get(address, 0) + 1
                if missed[address] >= 2:
                    self.prefills.pop(address, None)

    def info_of(self, address: str) -> dict:
        """Ask a prefill's bootstrap server once where its ranks are."""
        if address in self.prefills:
            return self.prefills[address]
        url = f"http://{address}/route?prefill_dp_rank=-1&target_tp_rank=-1"
        for _ in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    info = json.loads(answer.read())
                break
            except (OSError, urllib.error.HTTPError) as error:
                print(f"Error fetching prefill server info from bootstrap: {error}", flush=True)
                time.sleep(0.2)
        else:
            raise Refused(500, f"Could not fetch prefill parallel info from {address}")
        for key, option in (("page_size", "--page-size"), ("kv_cache_dtype", "--kv-cache-dtype")):
            if info[key] != self.layout[key]:
                raise Refused(
                    500,
                    f"mismatch: prefill server has {key}={info[key]}, but decode server has "
                    f"{key}={self.layout[key]}. Both servers must use the same {option} value.",
                )
        return self.prefills.setdefault(address, info)

    def receive(self, host: str, port: int, room: int, gone: object) -> str:
        """Return the KV that a prefill writes into a room, as the prompt that it is of."""
        info = self.info_of(f"{host}:{port}")
        try:
            connection = socket.create_connection((info["rank_ip"], info["rank_port"]), timeout=5)
        except OSError as error:
            raise Refused(500, f"KVTransferError(bootstrap_room={room}): {error}") from error
        with connection:
            connection.sendall(json.dumps({"room": room}).encode() + b"\n")
            deadline = time.monotonic() + waiting_time("SGLANG_DISAGGREGATION_WAITING_TIMEOUT")
            while not select.select([connection], [], [], POLL_S)[0]:
                if gone():
                    raise Refused(499, "the client has hung up")
                if time.monotonic() > deadline:
                    raise Refused(500, f"KVTransferError(bootstrap_room={room}): timed out")
            with connection.makefile("rb") as stream:
                head = stream.readline()
                if not head:
                    raise Refused(500, f"KVTransferError(bootstrap_room={room}): aborted")
                length, padding = map(int, head.split())
                kv = stream.read(length)
                stream.read(padding)
        return kv.decode()
