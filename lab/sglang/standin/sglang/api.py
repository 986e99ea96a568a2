"""The API server: completions, health, metrics."""

import json
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sglang import __version__
from sglang.handover import Receiver, Refused, Sender
from sglang.model import answer, prompt_of, tokens_of

HEALTH_S = 1.0
"""How long /health takes: a server generates a token for it, and looks once a second."""


class Served:
    """A server's state: what it is, and what it has counted."""

    def __init__(self, args: object) -> None:
        self.args = args
        self.is_up = False
        self.lock = threading.Lock()
        self.counters: dict[str, float] = {}
        self.sender = Sender(args) if args.disaggregation_mode == "prefill" else None
        self.receiver = Receiver(args) if args.disaggregation_mode == "decode" else None

    def count(self, name: str, amount: float) -> None:
        """Add to a counter, which is shown from its first time on."""
        with self.lock:
            self.counters[name] = self.counters.get(name, 0) + amount

    def page(self) -> str:
        """Return /metrics."""
        with self.lock:
            lines = [f"{name} {value}" for name, value in sorted(self.counters.items())]
        return "\n".join(lines) + "\n"

    def complete(self, body: dict, gone: object) -> tuple[str, int]:
        """Answer a prompt; return the text, and how long the prompt is."""
        args, prompt = self.args, prompt_of(body)
        count = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        length = tokens_of(prompt)
        if args.context_length and length + count > args.context_length:
            raise Refused(
                400,
                f"Requested token count exceeds the model's maximum context length of "
                f"{args.context_length} tokens.",
            )
        room = body.get("bootstrap_room")
        if (self.sender or self.receiver) and room is None:
            raise Refused(
                400, "Invalid request: Disaggregated request received without bootstrap room id."
            )
        kv = prompt
        if self.sender:
            self.moved(self.sender.send(room, prompt, gone))
            count = 1
        elif self.receiver:
            port = body.get("bootstrap_port") or args.disaggregation_bootstrap_port or 8998
            kv = self.receiver.receive(body["bootstrap_host"], port, room, gone)
        is_streaming = str(bool(body.get("stream"))).lower()
        labels = f'{{is_streaming="{is_streaming}",model_name="{args.served_model_name}"}}'
        self.count(f"sglang:prompt_tokens_total{labels}", length)
        self.count(f"sglang:num_requests_total{labels}", 1)
        return answer(kv, count), length

    def moved(self, size: int) -> None:
        """Count what was sent."""
        labels = f'{{model_name="{self.args.served_model_name}",tp_rank="0"}}'
        self.count(f"sglang:kv_transfer_total_mb_sum{labels}", size / (1 << 20))
        self.count(f"sglang:kv_transfer_total_mb_count{labels}", 1)


def serve(served: Served) -> ThreadingHTTPServer:
    """Open the API port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            args, path = served.args, self.path.partition("?")[0]
            if path in ("/health", "/health_generate"):
                if served.is_up:
                    time.sleep(HEALTH_S)
                self.say(200 if served.is_up else 503, b"")
            elif path == "/metrics" and args.enable_metrics:
                self.say(200, served.page().encode(), "text/plain")
            elif path in ("/server_info", "/get_server_info"):
                self.document({**vars(args)} | {"version": __version__})
            elif path in ("/model_info", "/get_model_info"):
                named = {"served_model_name": args.served_model_name or args.model_path}
                self.document({"model_path": args.model_path, "is_generation": True, **named})
            elif path == "/v1/models":
                card = {"id": args.served_model_name or args.model_path, "object": "model"}
                self.document({"object": "list", "data": [card]})
            else:
                self.document({"detail": "Not Found"}, 404)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            chat = self.path == "/v1/chat/completions"
            if not chat and self.path != "/v1/completions":
                self.document({"detail": "Not Found"}, 404)
                return
            try:
                body = json.loads(content)
                text, length = served.complete(body, self.has_gone)
            except Refused as error:
                kind = "BadRequestError" if error.status == 400 else "InternalServerError"
                said = {"object": "error", "message": str(error), "type": kind}
                print(error, flush=True)
                self.document({**said, "code": error.status}, error.status)
                return
            key = "delta" if body.get("stream") else "message"
            said = {key: {"role": "assistant", "content": text}} if chat else {"text": text}
            choice = {"index": 0, "finish_reason": "length", **said}
            made = {"id": "1", "object": "completion", "created": 1, "model": body.get("model")}
            made["choices"] = [choice]
            if body.get("stream"):
                pieces = f"data: {json.dumps(made)}\n\ndata: [DONE]\n\n"
                self.say(200, pieces.encode(), "text/event-stream")
                return
            made["usage"] = {"prompt_tokens": length, "completion_tokens": 1, "total_tokens": 1}
            self.document(made)

        def has_gone(self) -> bool:
            readable = select.select([self.connection], [], [], 0)[0]
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

        def document(self, made: object, status: int = 200) -> None:
            self.say(status, json.dumps(made, default=str).encode(), "application/json")

        def say(self, status: int, content: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    return ThreadingHTTPServer((served.args.host, served.args.port), Handler)
