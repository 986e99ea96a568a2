"""Admission of requests: a token budget per step, KV blocks and running sequences (4.6)."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from standin.metrics import Metrics

_POLL_SECONDS = 0.1  # how often a waiting request looks whether its client is still there


class ClientGone(Exception):
    """The client of a waiting request hung up."""


class Scheduler:
    """First come, first served; a request over the budget is never scheduled and blocks the queue.

    Args:
        budget: tokens per step; 0 = prompts are split, so none is too long.
        max_running: sequences at a time.
    """

    def __init__(self, budget: int, max_running: int, metrics: Metrics) -> None:
        self._budget = budget
        self._free = max_running
        self._metrics = metrics
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, tokens: int, client_gone: Callable[[], bool]) -> Iterator[None]:
        """Wait for the request's turn.

        Raises:
            ClientGone: the client hung up while the request waited.
        """
        self._metrics.add("vllm:num_requests_waiting", 1)
        try:
            self._wait(tokens, client_gone)
        finally:
            self._metrics.add("vllm:num_requests_waiting", -1)
        self._metrics.add("vllm:num_requests_running", 1)
        try:
            yield
        finally:
            self._metrics.add("vllm:num_requests_running", -1)
            self._leave()

    def _wait(self, tokens: int, client_gone: Callable[[], bool]) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while not self._runnable(ticket, tokens):
                    self._changed.wait(_POLL_SECONDS)
                    if client_gone():
                        raise ClientGone
                self._free -= 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _runnable(self, ticket: object, tokens: int) -> bool:
        fits = not self._budget or tokens <= self._budget
        return fits and self._free > 0 and self._queue[0] is ticket

    def _leave(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()
