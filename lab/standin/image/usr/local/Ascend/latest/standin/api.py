"""The HTTP side of the server."""

import argparse
import json
import os
import select
import socket
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standin import age, death, requests
from standin.decode import PullFailed
from standin.engine import Engine
from standin.faults import Faults
from standin.metrics import Metrics
from standin.requests import BadRequest
from standin.responses import Shape, error
from standin.scheduler import ClientGone


class Api(ThreadingHTTPServer):
    """A server that binds its port at once, but answers only after `server_activate` (all linked).

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(
        self,
        options: argparse.Namespace,
        faults: Faults,
        metrics: Metrics,
        keep_alive_seconds: float,
    ) -> None:
        super().__init__(("0.0.0.0", options.port), _Handler, bind_and_activate=False)
        self.server_bind()
        self.options = options
        self.model_name = options.served_model_name or options.model
        self.faults = faults
        self.metrics = metrics
        self.keep_alive_seconds = keep_alive_seconds
        self.engine: Engine | None = None
        self.revision = ""  # of omni-infer's package

    def server_bind(self) -> None:
        """Bind without the base class's name look-up, which can take seconds without DNS."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.server_address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client that hangs up, without a traceback."""
        print(f"WARNING connection of {client_address[0]} ended early", flush=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Api

    def handle(self) -> None:
        """Answer requests; an idle connection is closed by this side, so TIME_WAIT stays here.

        Only the pause between two requests is bounded, as by uvicorn: neither the wait for the
        first request nor a request that has begun.
        """
        self.close_connection = True
        self.handle_one_request()
        while not self.close_connection and self._another_begins():
            self.handle_one_request()

    def _another_begins(self) -> bool:
        self.connection.settimeout(self.server.keep_alive_seconds)
        try:
            begins = bool(self.rfile.peek(1))
        except TimeoutError:
            return False
        self.connection.settimeout(None)
        return begins

    def end_headers(self) -> None:
        """Send a header that says so if the connection ends with this answer."""
        if self.close_connection:
            self.send_header("Connection", "close")
        if self.server.revision:
            self.send_header("X-Omni-Revision", self.server.revision)
        super().end_headers()

    def _is_refused(self) -> bool:
        """Refuse a request below /v1 without the key of VLLM_API_KEY, as vLLM does."""
        key = os.environ.get("VLLM_API_KEY")
        given = self.headers.get("Authorization")
        if not key or not self.path.startswith("/v1") or given == f"Bearer {key}":
            return False
        self._send_json(401, {"error": "Unauthorized"})
        return True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self._is_refused():
            return
        if path == "/health":
            unhealthy = self.server.faults.now()["unhealthy"]
            self._send(500 if unhealthy else 200, b"", "text/plain")
        elif path == "/v1/models":
            self._send_json(200, self._models())
        elif path == "/metrics":
            self._send(200, self.server.metrics.render().encode(), "text/plain; version=0.0.4")
        elif path == "/version":
            self._send_json(200, {"version": age.value("vllm_version")})
        else:
            self._send_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        raw = self._body()
        if self._is_refused():
            return
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            self._send_json(404, {"detail": "Not Found"})
            return
        try:
            self._complete(raw)
        except BadRequest as problem:
            self._send_json(problem.status, error(str(problem), problem.status))
        except PullFailed as problem:
            print(f"ERROR KV pull failed: {problem}", flush=True)
            self._send_json(500, error(f"KV pull failed: {problem}", 500))
        except ClientGone:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Write one line per request to the server's log, as uvicorn does."""
        client = ":".join(map(str, self.client_address))
        print(f"INFO:     {client} - {format % args}", flush=True)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if self.command == "POST":
            self.server.metrics.add("standin:requests_total", status=int(code))
            self.log_message('"%s" %s', self.requestline, int(code))

    def _complete(self, raw: bytes) -> None:
        faults = self.server.faults.now()
        if faults["crash_on_request"]:
            death.crash(faults["exit_code"])
        time.sleep(faults["slow"])
        if faults["error_status"]:
            raise BadRequest("fault error_status", faults["error_status"])
        if faults["garbage"]:
            self._send(200, os.urandom(64).hex().encode(), "text/plain")
            return
        body = requests.parse_body(raw)
        requests.check_model(body, self.server.model_name)
        self._generate(body)

    def _generate(self, body: dict[str, Any]) -> None:
        chat = self.path.endswith("/chat/completions")
        request_id = self.headers.get("X-Request-Id") or str(uuid.uuid4())
        limit = self.server.options.max_model_len
        request = requests.to_request(body, chat, request_id, limit)
        shape = Shape(chat, request_id, self.server.model_name)
        with self.server.engine.generation(request, self._client_gone) as generation:
            if not body.get("stream"):
                self._send_json(200, shape.whole(generation))
                return
            options = body.get("stream_options") or {}
            self._stream(shape.chunks(generation, bool(options.get("include_usage"))))

    def _stream(self, chunks: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self._write_chunk(f"data: {json.dumps(chunk)}\n\n".encode())
        self._write_chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _write_chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunks(self) -> Any:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _client_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _models(self) -> dict[str, Any]:
        entry = {
            "id": self.server.model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.server.options.model,
            "parent": None,
            "max_model_len": self.server.options.max_model_len,
        }
        return {"object": "list", "data": [entry]}

    def _send_json(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
