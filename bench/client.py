"""A client that keeps asking, and measures how long it gets no completion."""

import socket
import threading
import time
from datetime import UTC, datetime
from typing import Self

import httpx

from bench.watch import Watch

TIMEOUT_S = 10  # a completion takes milliseconds; during a cut-over the port refuses at once
RETRY_S = 0.05
# Made once: reading the system's CAs takes longer than a completion. Each request has a connection
# of its own, as one that is kept may lead to what has stopped.
_HTTP = httpx.Client(
    timeout=TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
)


def completes(url: str, model: str = "qwen") -> bool:
    """Tell whether the service at `url` (`http://host:port`) answers with a completion."""
    body = {"model": model, "max_tokens": 5, "prompt": "hello"}
    try:
        answer = _HTTP.post(f"{url}/v1/completions", json=body)
        return answer.status_code == 200 and bool(answer.json()["choices"][0]["text"].strip())
    except (httpx.HTTPError, ValueError, LookupError):
        return False


class Client(Watch):
    """A client that asks for completions, one after the other.

    Args:
        pause: seconds between two requests.

    Attributes:
        gap: the longest time, in s, from the last completion before a failure to the first after.
    """

    def __init__(self, url: str, pause: float = 0) -> None:
        super().__init__()
        self._url = url
        self._pause = pause
        self._served = threading.Event()
        self._again = threading.Event()
        self.gap = 0.0

    def __enter__(self) -> Self:
        super().__enter__()
        if not self._served.wait(TIMEOUT_S):
            raise RuntimeError(f"expected {self._url} to serve, got no completion")
        return self

    def served_again(self) -> bool:
        """Wait for a completion after a failure; tell whether there was one."""
        return self._again.wait(TIMEOUT_S)

    def _watch(self) -> None:
        last, failed = 0.0, False
        while not self._over.wait(self._pause):
            if not completes(self._url):
                failed = True
                continue
            now = time.monotonic()
            if failed and last:
                self.gap = max(self.gap, now - last)
                self._again.set()
            last, failed = now, False
            self._served.set()


class WaitingClient(Watch):
    """A client of a service that goes down: once it is refused, it asks again until it is served.

    Until then, and while it is refused, it only looks whether the port is open: it must not slow
    down what it waits for.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._served: datetime | None = None

    def served(self, timeout: float) -> datetime:
        """Return when it was served.

        Args:
            timeout: for how long to wait for that, in seconds.
        """
        self._thread.join(timeout)
        if self._served is None:
            raise RuntimeError("expected the service to refuse a client and to serve it later")
        return self._served

    def _watch(self) -> None:
        while self._is_open() and not self._over.wait(RETRY_S):
            pass
        while not self._over.wait(RETRY_S):
            if self._is_open() and completes(self._url):
                self._served = datetime.now(UTC)
                return

    def _is_open(self) -> bool:
        url = httpx.URL(self._url)
        try:
            socket.create_connection((url.host, url.port or 80), timeout=1).close()
        except OSError:
            return False
        return True
