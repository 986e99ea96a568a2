"""Prefill's KV blocks: kept for decode until it says that it has them (contract 5.4)."""

import threading

from standin.metrics import Metrics
from standin.model import block_count


class KvStore:
    """KV by block ids; freed by request id. Nothing times out, as in release 0.3.0 (3.3)."""

    def __init__(self, metrics: Metrics) -> None:
        self._lock = threading.Lock()
        self._metrics = metrics
        self._next_block = 1
        self._kv: dict[tuple[int, ...], bytes] = {}
        self._requests: dict[str, list[tuple[int, ...]]] = {}

    def keep(self, request_id: str, kv: bytes, tokens: int) -> list[int]:
        """Keep a prompt's KV; return the ids of its blocks."""
        with self._lock:
            first = self._next_block
            self._next_block += block_count(tokens)
            blocks = tuple(range(first, self._next_block))
            self._kv[blocks] = kv
            self._requests.setdefault(request_id, []).append(blocks)
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
            for blocks in freed:
                del self._kv[blocks]
        count = sum(len(blocks) for blocks in freed)
        self._metrics.add("standin:kv_blocks_held", -count)
        self._metrics.add("standin:kv_requests_held", -len(freed))
        self._metrics.add("standin:kv_blocks_released_total", count)
        return bool(freed)
