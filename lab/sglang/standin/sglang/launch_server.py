"""`python3 -m sglang.launch_server`: checks, then serves, alone or with the pod's other hosts."""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sglang.api import Served, serve
from sglang.options import parser

LOAD_S = 0.5
JOIN_S = 60.0
DERIVED_PORTS = 6
"""How many ports attention's data parallelism takes after that of --dist-init-addr."""
DELTA = 233
"""How far above the API port they are without --dist-init-addr."""


def check(args: argparse.Namespace) -> None:
    """Refuse what the real server refuses when it resolves its arguments."""
    if not Path(args.model_path).is_dir():
        raise ValueError(f"{args.model_path} is not a local folder and is not a valid model")
    args.tp_size, args.dp_size = args.tp_size or 1, args.dp_size or 1
    args.nnodes, args.node_rank = args.nnodes or 1, args.node_rank or 0
    args.disaggregation_mode = args.disaggregation_mode or "null"
    args.disaggregation_transfer_backend = args.disaggregation_transfer_backend or "mooncake"
    if args.enable_dp_attention and not args.attn_dp_size:
        args.attn_dp_size, args.dp_size = args.dp_size, 1
    args.attn_dp_size = args.attn_dp_size or 1
    if args.nnodes > 1 and not args.dist_init_addr:
        raise ValueError("--dist-init-addr is needed with --nnodes > 1")
    if args.nnodes > 1 and args.dp_size > 1:
        raise ValueError("multi-node data parallel is not supported unless dp attention!")
    if args.attn_dp_size > 1 and args.dp_size > 1:
        raise ValueError(f"--dp-size {args.dp_size} with --attn-dp-size {args.attn_dp_size}")
    if args.tp_size % args.attn_dp_size or args.tp_size % args.nnodes:
        raise ValueError("tp_size must be divisible by attn_dp_size and nnodes")
    if args.disaggregation_mode == "prefill" and args.disaggregation_transfer_backend == "fake":
        raise ValueError("Prefill server does not support 'fake' as the transfer backend")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    needed = args.tp_size * args.dp_size * (args.pp_size or 1) // args.nnodes
    if args.device == "cuda" and visible and len(visible.split(",")) < needed:
        raise RuntimeError("CUDA error: invalid device ordinal")


def own_ports(args: argparse.Namespace) -> list[socket.socket]:
    """Bind the ports by which the processes of attention's data parallelism find each other."""
    if args.attn_dp_size == 1 or args.node_rank:
        return []
    if args.dist_init_addr:
        host, port = args.dist_init_addr.rsplit(":", 1)
        first = int(port) + 1
    else:
        host, first = "127.0.0.1", args.port + DELTA
    return [socket.create_server((host, first + i)) for i in range(DERIVED_PORTS)]


def join(args: argparse.Namespace) -> None:
    """Have the pod's hosts meet at the first one; one that loses another ends."""
    if args.nnodes == 1:
        return
    host, port = args.dist_init_addr.rsplit(":", 1)
    deadline = time.monotonic() + JOIN_S
    peers: list[socket.socket] = []
    if args.node_rank == 0:
        listener = socket.create_server((host, int(port)))
        listener.settimeout(JOIN_S)
        peers += [listener.accept()[0] for _ in range(args.nnodes - 1)]
    while args.node_rank and not peers:
        try:
            peers.append(socket.create_connection((host, int(port)), timeout=1))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    for peer in peers:
        peer.settimeout(None)
        threading.Thread(target=watch, args=(peer,), daemon=True).start()


def watch(peer: socket.socket) -> None:
    """End with a peer."""
    peer.recv(1)
    print("a peer of this pod has gone", flush=True)
    os._exit(1)


def well(args: argparse.Namespace) -> ThreadingHTTPServer:
    """Serve what hosts other than the first do: they only say that they are well."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path in ("/health", "/health_generate", "/ping")
            self.send_response(200 if known else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    return ThreadingHTTPServer((args.host, args.port), Handler)


def main() -> None:
    """Run a server until it is told to end."""
    args = parser().parse_args()
    check(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    args.host, args.port = args.host or "127.0.0.1", args.port or 30000
    with ExitStack() as stack:
        for taken in own_ports(args):
            stack.enter_context(taken)
        join(args)
        if args.node_rank:
            well(args).serve_forever()
        served = Served(args)
        api = serve(served)
        threading.Thread(target=api.serve_forever, daemon=True).start()
        time.sleep(LOAD_S)
        served.is_up = True
        print("The server is fired up and ready to roll!", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
