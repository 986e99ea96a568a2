"""The load generator: so many requests, so many at a time, each timed.

It runs where pd-deploy does, and reaches the proxy as the smoke test does, through SSH: so it is
the same for all images, needs nothing on the hosts, and can ask before clients can. Its own delay
is measured as well, so that a busy machine is not taken for a slow service.
"""

import asyncio
import contextlib
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from pd_deploy.config.models import Deployment
from pd_deploy.records.benchmark import Load, Sample
from pd_deploy.steps.verify import requests
from pd_deploy.steps.verify.answers import SHOWN

WARM_UP_TOKENS = 4
TICK_S = 0.02
"""How often the event loop is asked whether it is late."""
DATA, DONE = "data: ", "[DONE]"


@dataclass
class Measured:
    """What a load found.

    Attributes:
        seconds: how long it took, without the warm-up.
        delays: by how many seconds each look at the clock was late.
        busy: share of a core that this process used.
    """

    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    delays: list[float] = field(default_factory=list)
    busy: float = 0.0


async def carried(
    entrances: Sequence[tuple[httpx.AsyncClient, str]],
    deployment: Deployment,
    load: Load,
    fields: Mapping[str, Any],
    *,
    limit: float,
    token_ids: bool = True,
) -> Measured:
    """Send a load to a service; return how it carried it.

    First it is warmed up by as many short answers as are asked for at a time, which do not count:
    an engine compiles for what it has not met before.

    Args:
        entrances: where completions are, each URL with its client; they are asked in turn.
        fields: what keeps requests from being answered from a cache.
        limit: seconds after which what is under way is given up, and nothing more is sent.
        token_ids: whether prompts may be token ids.
    """
    measured, sending, turns = Measured(), iter(range(load.requests)), itertools.cycle(entrances)

    def body() -> dict[str, Any]:
        seed = str(uuid.uuid4())
        return {**requests.of_load(deployment, load, seed, token_ids=token_ids), **fields}

    async def warm_up() -> None:
        await _timed(*next(turns), {**body(), "max_tokens": WARM_UP_TOKENS}, _Stream())

    async def slot() -> None:
        for _ in sending:
            stream, (client, url) = _Stream(), next(turns)
            try:
                sample = await _timed(client, url, body(), stream)
            except asyncio.CancelledError:
                measured.samples.append(Sample(stream.chunks, cut=True))
                raise
            if sample.fault and len(entrances) > 1:
                sample = replace(sample, fault=f"{sample.fault} from {url}")
            measured.samples.append(sample)

    slots = range(min(load.concurrency, load.requests))
    ends = _now() + limit
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(ends):
            await _together([warm_up() for _ in slots])
    async with _watched(measured):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(ends):
                await _together([slot() for _ in slots])
    return measured


async def _together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run the slots; if one fails, such as when the way to the host is lost, end all of them."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _watched(measured: Measured) -> AsyncIterator[None]:
    """Measure how long the load takes, and what it costs this process."""
    began, used = _now(), time.process_time()
    watch = asyncio.ensure_future(_watch(measured.delays))
    try:
        yield
    finally:
        watch.cancel()
        measured.seconds = _now() - began
        measured.busy = (time.process_time() - used) / max(measured.seconds, TICK_S)


async def _watch(delays: list[float]) -> None:
    while True:
        due = _now() + TICK_S
        await asyncio.sleep(TICK_S)
        delays.append(max(_now() - due, 0.0))


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class _Stream:
    """What has come of an answer so far; `tokens` once the answer says how many they are."""

    first: float = 0.0
    last: float = 0.0
    chunks: int = 0
    tokens: int | None = None
    is_whole: bool = False

    def take(self, data: str) -> None:
        """Take an event of the answer.

        Raises:
            ValueError, LookupError, TypeError: it is no part of a completion.
        """
        now = _now()
        if data == DONE:
            self.is_whole = True
            return
        event = json.loads(data)
        if event["choices"]:
            self.first = self.first or now
            self.last = now
            self.chunks += 1
        if usage := event.get("usage"):
            self.tokens = int(usage["completion_tokens"])

    def sample(self, began: float) -> Sample:
        """Say what the answer was, now that it has ended."""
        if not self.is_whole or not self.chunks:
            return Sample(0, fault=f"an answer of {self.chunks} events that ended without {DONE}")
        # An event may hold several tokens, where an engine guesses ahead.
        tokens = self.tokens or self.chunks
        tpot = (self.last - self.first) / (tokens - 1) if tokens > 1 and self.chunks > 1 else None
        return Sample(tokens, ttft=self.first - began, tpot=tpot)


async def _timed(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any], stream: _Stream
) -> Sample:
    """Send a request and time its answer; send it again on a new connection if the first one was
    closed just when it was used again."""
    try:
        return await _streamed(client, url, body, stream)
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        if stream.chunks:
            return Sample(0, fault=f"an answer that broke off ({_said(error)})")
    try:
        return await _streamed(client, url, body, stream)
    except httpx.HTTPError as error:
        return Sample(0, fault=f"no answer ({_said(error)})")


async def _streamed(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any], stream: _Stream
) -> Sample:
    began = _now()
    async with client.stream("POST", url, json=body, timeout=None) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode(errors="replace")
            return Sample(0, fault=f"status {answer.status_code}: {text[:SHOWN]!r}")
        async for line in answer.aiter_lines():
            try:
                if line.startswith(DATA):
                    stream.take(line.removeprefix(DATA))
            except (ValueError, LookupError, TypeError, AttributeError):
                return Sample(0, fault=f"{line[:SHOWN]!r}")
    return stream.sample(began)


def _said(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
