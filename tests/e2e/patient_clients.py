"""Clients that try again as OpenAI's library does, and say which requests they have lost."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import httpx

RETRIES = 2
TIMEOUT_S = 60.0
PAUSE_S = 0.02
REFUSED = 0
# The likeliest tokens: a model of random weights, as the lab's vLLM has, may otherwise begin with
# the token that ends a text, or answer in blanks; that would count as an answer that was lost.
BODY = {"model": "qwen", "max_tokens": 5, "prompt": "a story", "temperature": 0}


@dataclass
class Kept:
    """What became of one client's requests; `longest` is in seconds.

    Attributes:
        refused: connections that nobody took, though they may have been tried again.
        lost: why requests had no answer in the end.
    """

    answered: int = 0
    refused: int = 0
    longest: float = 0.0
    lost: list[str] = field(default_factory=list)


class PatientClients:
    """Clients that ask all the time: over one connection, over new ones, and for streams.

    A further one looks at /health; it has no patience.

    Attributes:
        health: the statuses that it has seen, `REFUSED` among them if it could not connect.
    """

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/completions"
        self._over = threading.Event()
        self.health = set[int]()
        self.kept = {"keep-alive": Kept(), "new connections": Kept(), "streams": Kept()}
        asks: list[tuple[str, Callable[[httpx.Client], None]]] = [
            ("keep-alive", self._complete),
            ("new connections", self._complete),
            ("streams", self._stream),
        ]
        self._threads = [threading.Thread(target=self._ask, args=each) for each in asks]
        self._threads.append(threading.Thread(target=self._look, args=(f"{url}/health",)))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, kind: str, ask: Callable[[httpx.Client], None]) -> None:
        kept, client = self.kept[kind], _client()
        while not self._over.wait(PAUSE_S):
            if kind != "keep-alive":
                client.close()
                client = _client()
            begin = time.monotonic()
            try:
                self._patiently(kept, client, ask)
                kept.answered += 1
            except (httpx.HTTPError, ValueError) as error:
                kept.lost.append(f"{type(error).__name__}: {error}")
            kept.longest = max(kept.longest, time.monotonic() - begin)
        client.close()

    def _patiently(
        self, kept: Kept, client: httpx.Client, ask: Callable[[httpx.Client], None]
    ) -> None:
        for retry in range(RETRIES + 1):
            wait = min(0.5 * 2**retry, 8.0)
            try:
                return ask(client)
            except httpx.HTTPStatusError as error:
                if retry == RETRIES or error.response.status_code < 500:
                    raise
                wait = float(error.response.headers.get("retry-after", wait))
            except httpx.TransportError as error:
                kept.refused += isinstance(error, httpx.ConnectError)
                if retry == RETRIES:
                    raise
            time.sleep(wait)
        raise AssertionError

    def _complete(self, client: httpx.Client) -> None:
        answer = client.post(self._url, json=BODY).raise_for_status()
        if not answer.json()["choices"][0]["text"].strip():
            raise ValueError("an empty answer")

    def _stream(self, client: httpx.Client) -> None:
        """Read a stream; one that is cut is lost, because a client has shown its beginning."""
        lines = list[str]()
        try:
            with client.stream("POST", self._url, json={**BODY, "stream": True}) as answer:
                answer.raise_for_status()
                lines += (line for line in answer.iter_lines() if line)
        except httpx.TransportError as error:
            if lines:
                raise ValueError(f"a stream that is cut after {lines}") from error
            raise
        if lines[-1:] != ["data: [DONE]"]:
            raise ValueError(f"a stream that ends with {lines[-1:]}")
        json.loads(lines[0].removeprefix("data: "))

    def _look(self, url: str) -> None:
        while not self._over.wait(PAUSE_S):
            try:
                self.health.add(httpx.get(url, trust_env=False, timeout=2).status_code)
            except httpx.ConnectError:
                self.health.add(REFUSED)
            except httpx.TransportError:
                pass  # a busy machine


def _client() -> httpx.Client:
    # Authorities, of which plain HTTP needs none, take long to load.
    return httpx.Client(timeout=TIMEOUT_S, trust_env=False, verify=False)
