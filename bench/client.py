"""A client that keeps asking, and measures how long it gets no completion."""

import threading
import time
from typing import Self

import httpx

TIMEOUT_S = 10  # a completion takes milliseconds; during a cut-over the port refuses at once


def completes(url: str, model: str = "qwen") -> bool:
    """Tell whether the service at `url` (`http://host:port`) answers with a completion."""
    body = {"model": model, "max_tokens": 5, "prompt": "hello"}
    try:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False)
        return answer.status_code == 200 and bool(answer.json()["choices"][0]["text"].strip())
    except (httpx.HTTPError, ValueError, LookupError):
        return False


class Client:
    """A client that asks for completions, one after the other.

    Args:
        pause: seconds between two requests.

    Attributes:
        gap: the longest time, in s, from the last completion before a failure to the first after.
    """

    def __init__(self, url: str, pause: float = 0) -> None:
        self._url = url
        self._pause = pause
        self._served = threading.Event()
        self._again = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.gap = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._served.wait(TIMEOUT_S):
            raise RuntimeError(f"expected {self._url} to serve, got no completion")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def served_again(self) -> bool:
        """Wait for a completion after a failure; tell whether there was one."""
        return self._again.wait(TIMEOUT_S)

    def _ask(self) -> None:
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
