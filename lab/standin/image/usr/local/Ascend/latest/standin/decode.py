"""Decode's side of KV transfer: links with every prefill pod, pulls KV, releases it (3.3, 5.4)."""

import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from standin import wire
from standin.instance import Instance, Peer
from standin.metrics import Metrics

_POLL_SECONDS = 0.1
_PULL_SECONDS = 20.0
_PULL_ATTEMPTS = 3
_PULL_PAUSE_SECONDS = 0.2  # upstream pauses 2 s


class PullFailed(Exception):
    """The KV of a request could not be had."""


@dataclass(frozen=True)
class _Link:
    peer: Peer
    connection: socket.socket
    stream: BinaryIO
    token: str
    kv_parallel_size: int  # as prefill has it


class DecodeSide:
    """The links to all prefill pods of the ranktable."""

    def __init__(self, instance: Instance, metrics: Metrics) -> None:
        self._instance = instance
        self._metrics = metrics
        self._links: dict[int, _Link] = {}

    def link(self) -> None:
        """Wait until all prefill pods have linked with all decode servers.

        Raises:
            RuntimeError: a link FAILED, or HCCL_CONNECT_TIMEOUT passed.
        """
        deadline = time.monotonic() + self._instance.link_timeout
        while missing := [p for p in self._instance.prefills if p.cluster_id not in self._links]:
            for peer in missing:
                self._try_link(peer)
            self._pause_until(deadline, "no link with every prefill")
        while not all([self._peer_complete(link) for link in self._links.values()]):
            self._pause_until(deadline, "other decode servers did not link")
        for link in self._links.values():
            threading.Thread(target=self._watch, args=(link,), daemon=True).start()

    def pull(self, cluster_id: object, block_ids: object, announced: str) -> bytes:
        """Fetch the KV of these blocks from the prefill pod that holds them.

        Args:
            announced: prefill's address; not needed, since the links stand.

        Raises:
            PullFailed: unknown cluster, unreachable prefill, or KV not held there.
        """
        link = self._links.get(cluster_id) if isinstance(cluster_id, int) else None
        if link is None:
            raise PullFailed(f"no link with cluster {cluster_id!r}, only with {sorted(self._links)}")
        if not isinstance(block_ids, list) or not all(type(i) is int for i in block_ids):
            raise PullFailed(f"remote_block_ids must be a list of numbers, found {block_ids!r}")
        kv = self._pull_with_retries(link, block_ids)
        self._metrics.add("standin:kv_transfers_total", cluster_id=cluster_id)
        self._metrics.add("standin:kv_transfer_bytes_total", len(kv), cluster_id=cluster_id)
        return kv

    def reads_other_heads(self, cluster_id: int) -> bool:
        """Tell whether the KV of this cluster goes to the wrong ranks.

        In newer images kv_parallel_size is decode's tensor parallel size and decides which rank
        reads from which; nothing compares it, so a wrong value on either side shows only in the
        answers (1.4).
        """
        if not self._instance.pairs_by_tp:
            return False
        values = {self._instance.kv_parallel_size, self._links[cluster_id].kv_parallel_size}
        return values != {self._instance.tensor_parallel_size}

    def release(self, remote_host_ip: str, request_id: str) -> None:
        """Tell prefill that its blocks can go; like a ZMQ PUSH, a failure is only logged."""
        address = urlsplit(remote_host_ip)
        try:
            with socket.create_connection((address.hostname, address.port), timeout=5) as push:
                push.sendall(request_id.encode() + b"\n")
        except (OSError, ValueError) as error:
            self._metrics.add("standin:kv_release_errors_total")
            print(f"WARNING cannot release {request_id} at {remote_host_ip}: {error}", flush=True)

    def _pause_until(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            timeout = self._instance.link_timeout
            raise RuntimeError(f"{what} after HCCL_CONNECT_TIMEOUT={timeout:g} s")
        time.sleep(_POLL_SECONDS)

    def _try_link(self, peer: Peer) -> None:
        try:
            connection = socket.create_connection((peer.host, peer.port), timeout=5)
        except OSError:
            return
        stream = connection.makefile("rb")
        answer = _ask(connection, stream, self._hello(peer))
        if answer is None:
            connection.close()
            return
        expected = {
            "status": "ok",
            "role": "prefill",
            "cluster_id": peer.cluster_id,
            "digest": self._instance.digest,
        }
        if any(answer.get(key) != value for key, value in expected.items()):
            reason = answer.get("reason", f"cluster {peer.cluster_id} answered {answer}")
            raise RuntimeError(f"link status FAILED: {reason}")
        connection.settimeout(None)
        self._links[peer.cluster_id] = _Link(
            peer, connection, stream, answer["token"], answer["kv_parallel_size"]
        )
        self._metrics.add("standin:links")
        print(f"INFO linked with prefill cluster {peer.cluster_id}", flush=True)

    def _hello(self, peer: Peer) -> dict[str, Any]:
        mine = self._instance
        return {
            "op": "link",
            "role": mine.role,
            "cluster_id": mine.cluster_id,
            "to": peer.cluster_id,
            "digest": mine.digest,
            "dp_size": mine.dp_size,
            "dp_rank": mine.dp_rank,
        }

    def _peer_complete(self, link: _Link) -> bool:
        answer = _ask(link.connection, link.stream, {"op": "poll", "token": link.token})
        if answer is None:
            raise RuntimeError(f"prefill cluster {link.peer.cluster_id} died while linking")
        return answer["complete"] is True

    def _watch(self, link: _Link) -> None:
        try:
            link.stream.read(1)
        except OSError:
            pass
        self._metrics.add("standin:links", -1)
        print(f"ERROR lost the link with prefill cluster {link.peer.cluster_id}", flush=True)

    def _pull_with_retries(self, link: _Link, block_ids: object) -> bytes:
        for attempt in range(_PULL_ATTEMPTS):
            if attempt:
                time.sleep(_PULL_PAUSE_SECONDS)
            try:
                return _pull_once(link, block_ids)
            except OSError as error:
                problem = str(error)
        raise PullFailed(f"prefill cluster {link.peer.cluster_id} is unreachable: {problem}")


def _ask(
    connection: socket.socket, stream: BinaryIO, message: dict[str, Any]
) -> dict[str, Any] | None:
    try:
        wire.send(connection, message)
    except OSError:
        return None
    return wire.receive(stream)


def _pull_once(link: _Link, block_ids: object) -> bytes:
    address = (link.peer.host, link.peer.port)
    with socket.create_connection(address, timeout=_PULL_SECONDS) as connection:
        stream = connection.makefile("rb")
        wire.send(connection, {"op": "pull", "token": link.token, "block_ids": block_ids})
        answer = wire.receive(stream) or {"status": "failed", "reason": "closed the connection"}
        if answer["status"] != "ok":
            raise PullFailed(f"prefill cluster {link.peer.cluster_id} {answer['reason']}")
        kv = stream.read(answer["bytes"])
    if len(kv) != answer["bytes"]:
        raise ConnectionError("KV ended early")
    return kv
