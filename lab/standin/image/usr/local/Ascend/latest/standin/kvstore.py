"""Prefill's KV blocks: kept for decode until it says that it has them (contract 5.4)."""

import threading
import time

from standin.metrics import Metrics
from standin.model import block_count


class KvStore:
    """KV by block ids; freed by request id.

    Without a time to keep it nothing times out, as in release 0.3.0 (3.3). With it, what is older
    is freed before the next one is kept.
    """

    def __init__(self, metrics: Metrics, seconds: float | None = None) -> None:
        self._lock = threading.Lock()
        self._metrics = metrics
        self._next_block = 1
        self._kv: dict[tuple[int, ...], bytes] = {}
        self._requests: dict[str, list[tuple[int, ...]]] = {}
        self._seconds = seconds
        self._since: dict[str, float] = {}  # by request id

    def keep(self, request_id: str, kv: bytes, tokens: int) -> list[int]:
        """Keep a prompt's KV; return the ids of its blocks."""
        self._free_old()
        with self._lock:
            first = self._next_block
            self._next_block += block_count(tokens)
            blocks = tuple(range(first, self._next_block))
            self._kv[blocks] = kv
            self._requests.setdefault(request_id, []).append(blocks)
            self._since[request_id] = time.monotonic()
        self._metrics.add("standin:kv_blocks_held", len(blocks))
        self._metrics.add("standin:kv_requests_held")
        return list(blocks)

    def read(self, blocks: list[int]) -> bytes | None:
        """Return the KV of these blocks; None if it is not (or no longer) held."""
        with self._lock:
            return self._kv.get(tuple(blocks))

    def release(self, request_id: str) -> bool:
        """Free the blocks of a request; return False if none are held under that id."""
        with self._lock:
            freed = self._requests.pop(request_id, [])
            self._since.pop(request_id, None)
            for blocks in freed:
                del self._kv[blocks]
        count = sum(len(blocks) for blocks in freed)
        self._metrics.add("standin:kv_blocks_held", -count)
        self._metrics.add("standin:kv_requests_held", -len(freed))
        self._metrics.add("standin:kv_blocks_released_total", count)
        return bool(freed)

    def _free_old(self) -> None:
        if self._seconds is None:
            return
        with self._lock:
            oldest = time.monotonic() - self._seconds
            old = [request_id for request_id, since in self._since.items() if since < oldest]
        for request_id in old:
            print(f"WARNING nobody asked for the KV of {request_id} in time", flush=True)
            self.release(request_id)
