"""Prefill's side of KV transfer: links with decode, hands KV over, frees it (3.3, 5.4)."""

import secrets
import socket
import threading
from dataclasses import dataclass
from typing import Any, BinaryIO

from standin import wire
from standin.faults import Faults
from standin.instance import Instance
from standin.kvstore import KvStore
from standin.metrics import Metrics


@dataclass
class _Link:
    dp_rank: int
    token: str
    up: bool = False


class PrefillSide:
    """Listeners for decode's links and pulls, and on the ZMQ port for its releases."""

    def __init__(self, instance: Instance, store: KvStore, faults: Faults, metrics: Metrics) -> None:
        self._instance = instance
        self._store = store
        self._faults = faults
        self._metrics = metrics
        self._links: dict[int, _Link] = {}  # by decode cluster id; never removed: links are static
        self._decode_servers = 0
        self._failure = ""
        self._changed = threading.Condition()

    def link(self, link_listener: socket.socket, release_listener: socket.socket) -> None:
        """Wait until every decode server has linked with every prefill pod.

        Raises:
            RuntimeError: a link FAILED, or HCCL_CONNECT_TIMEOUT passed.
        """
        wire.serve(release_listener, self._serve_releases)
        wire.serve(link_listener, self._serve_peer)
        timeout = self._instance.link_timeout
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._complete(), timeout)
            if self._failure:
                raise RuntimeError(f"link status FAILED: {self._failure}")
            if not self._complete():
                raise RuntimeError(f"no link with decode after HCCL_CONNECT_TIMEOUT={timeout:g} s")

    def _complete(self) -> bool:
        up = sum(link.up for link in self._links.values())
        return 0 < self._decode_servers == up

    def _serve_peer(self, stream: BinaryIO, connection: socket.socket) -> None:
        linked = False
        while message := wire.receive(stream):
            if message.get("op") == "pull":
                self._send_kv(message, connection)
                continue
            answer = self._polled(message) if message.get("op") == "poll" else self._linked(message)
            linked = linked or answer.get("status") == "ok"
            wire.send(connection, answer)
        if linked:
            self._metrics.add("standin:links", -1)
            print("ERROR lost the link with decode", flush=True)

    def _linked(self, hello: dict[str, Any]) -> dict[str, Any]:
        problem = self._mismatch(hello)
        with self._changed:
            serving = self._complete()
            if not problem and hello["cluster_id"] in self._links:
                # Not this side's failure: the first link stays as it is.
                return self._refusal(f"cluster {hello['cluster_id']} is linked already")
            if problem:
                if not serving:
                    self._failure = problem
                    self._changed.notify_all()
                return self._refusal(problem)
            link = _Link(hello["dp_rank"], secrets.token_hex(8))
            self._links[hello["cluster_id"]] = link
            self._decode_servers = hello["dp_size"]
            self._metrics.add("standin:links")
        print(f"INFO linked with decode cluster {hello['cluster_id']}", flush=True)
        return {"status": "ok", "token": link.token, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        mine = self._instance
        return {
            "role": mine.role,
            "cluster_id": mine.cluster_id,
            "digest": mine.digest,
            "kv_parallel_size": mine.kv_parallel_size,
        }

    def _refusal(self, reason: str) -> dict[str, Any]:
        print(f"ERROR link refused: {reason}", flush=True)
        return {"status": "failed", "reason": f"prefill cluster {self._instance.cluster_id}: {reason}"}

    def _mismatch(self, hello: dict[str, Any]) -> str:
        expected = {
            "role": "decode",
            "to": self._instance.cluster_id,
            "digest": self._instance.digest,
        }
        for key, value in expected.items():
            if hello.get(key) != value:
                return f"{key}: expected {value!r}, peer has {hello.get(key)!r}"
        return ""

    def _polled(self, message: dict[str, Any]) -> dict[str, Any]:
        with self._changed:
            for link in self._links.values():
                if link.token == message.get("token"):
                    link.up = True
            self._changed.notify_all()
            return {"complete": self._complete()}

    def _send_kv(self, message: dict[str, Any], connection: socket.socket) -> None:
        with self._changed:
            known = any(link.token == message.get("token") for link in self._links.values())
        kv = self._store.read(message["block_ids"]) if known else None
        if kv is None or self._faults.now()["refuse_kv"]:
            held = "does not hold these blocks" if known else "has no link with this decode"
            reason = held if kv is None else "was told to refuse (fault refuse_kv)"
            wire.send(connection, {"status": "failed", "reason": reason})
            return
        wire.send(connection, {"status": "ok", "bytes": len(kv)})
        connection.sendall(kv)
        self._metrics.add("standin:kv_sent_bytes_total", len(kv))

    def _serve_releases(self, stream: BinaryIO, _connection: socket.socket) -> None:
        for line in stream:
            request_id = line.decode().strip()
            if self._faults.now()["keep_kv"]:
                continue
            if not self._store.release(request_id):
                print(f"WARNING release of unknown request {request_id}", flush=True)
