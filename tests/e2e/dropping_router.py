#!/usr/bin/python3
"""A router with a fault: it sends each request to a prefill, and drops what decode needs of the
answer to fetch the KV. Runs in the lab's containers in place of vllm-router; standard library."""

import argparse
import json
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--prefill")
parser.add_argument("--decode")
options, _ = parser.parse_known_args()


def post(url, path, body):
    """The answer to a request."""
    request = urllib.request.Request(url + path, json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return answer.read()


class Handler(BaseHTTPRequestHandler):
    """Ready at once; prefill, then decode."""

    def do_GET(self):
        self.answer(b"ok")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        hand_over = {"do_remote_decode": True, "do_remote_prefill": False}
        post(options.prefill, self.path, body | {"max_tokens": 1, "kv_transfer_params": hand_over})
        self.answer(post(options.decode, self.path, body))

    def answer(self, content):
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
