"""Proof that decode used the KV that prefill made, by the servers' own counters.

An answer alone proves nothing: where the hand-over gets lost on the way, decode computes the
prompt itself and answers all the same.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import httpx

from pd_deploy import metrics
from pd_deploy.engines.base import Counters
from pd_deploy.errors import SmokeTestFailed
from pd_deploy.rollout import Rollout
from pd_deploy.topology import Instance

ROUNDS = 2
"""Requests per prefill and decode, one by one, until each has served; then as often all at once,
because a proxy that looks for the least load sends single requests always to the same."""
SETTLED_WITHIN_S = 5.0
POLL_INTERVAL_S = 0.1
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What a request gave: the text, the prompt's length in tokens if it is said, the time."""

    text: str
    prompt_tokens: int | None
    seconds: float


@dataclass(frozen=True)
class Handover:
    """The way of one request, or of some at once: `prefill` and `decode` are those that served,
    as `p0 (a)` with the host; `kv_tokens` came from prefill, `kv_bytes` were moved for it if that
    is counted."""

    prefill: str
    decode: str
    requests: int
    prompt_tokens: int
    kv_tokens: int
    kv_bytes: int | None

    @property
    def complete(self) -> bool:
        """Whether decode computed nothing of the prompts, but perhaps the last token of each: the
        first token of the answer follows from it."""
        needed = max(self.prompt_tokens - self.requests, 1)
        return bool(self.prefill) and self.kv_tokens >= needed and self.kv_bytes != 0

    def __str__(self) -> str:
        moved = "" if self.kv_bytes is None else f", {self.kv_bytes} bytes"
        return (
            f"KV of {self.kv_tokens} of {self.prompt_tokens} prompt tokens went from "
            f"{self.prefill or 'no prefill'} to {self.decode or 'no decode'}{moved}"
        )


@dataclass(frozen=True)
class Proof:
    """Whether KV was seen to move; `reason` says why that could not be seen."""

    verdict: Literal["proven", "not provable"]
    handovers: tuple[Handover, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.verdict == "not provable":
            return f"KV transfer not provable: {self.reason}"
        ways = dict.fromkeys(f"{one.prefill} → {one.decode}" for one in self.handovers)
        return f"KV transfer proven by the servers' counters: {', '.join(ways)}"


@dataclass(frozen=True)
class Counts:
    """An instance's counters; None for what it does not count."""

    served: float | None
    kv_tokens: float | None
    kv_bytes: float | None


async def prove(rollout: Rollout, ask: Callable[[str], Awaitable[Answer]]) -> tuple[Answer, Proof]:
    """Sends requests until every prefill and every decode has served one, and follows the KV.

    Args:
        ask: sends the service one request, given a text that no other request has.

    Raises:
        SmokeTestFailed: decode computed the prompt itself, an instance is left out, or the answer
            depends on which prefill made the KV.
    """
    serving = [i for i in rollout.site.topology.instances if i.api_ports]
    count = len(serving)
    async with _open(rollout, serving) as read:
        before, answers, ways = await read(), list[Answer](), list[Handover]()
        left_out = {i.name for i in serving}
        for size in (*[1] * (ROUNDS * count), *[count] * ROUNDS):
            last = await _ask(ask, size)
            after = await _settled(read, before, serving)
            if reason := not_counted(rollout.site.engine.COUNTERS, serving, after, last):
                return last[0], Proof("not provable", reason=reason)
            ways.append(handover(serving, before, after, last))
            answers += last
            _check(rollout, answers, ways)
            left_out -= {i.name for i in serving if _moved(before, after, i.name, "served")}
            if not left_out:
                return answers[0], Proof("proven", tuple(ways))
            before = after
    raise _failed(
        rollout,
        f"expected every prefill and decode to serve, found {', '.join(sorted(left_out))} left out "
        f"by {len(answers)} requests",
        "see the proxy's log for why it leaves it out",
    )


async def _ask(ask: Callable[[str], Awaitable[Answer]], size: int) -> list[Answer]:
    """Some requests at once; when one fails, the others end first."""
    asked = [ask(f"pd-deploy-{time.time_ns()}-{index}") for index in range(size)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, Answer)]


@asynccontextmanager
async def _open(
    rollout: Rollout, serving: Sequence[Instance]
) -> AsyncIterator[Callable[[], Awaitable[dict[str, Counts]]]]:
    """A way to read the counters of all instances, again and again."""
    async with AsyncExitStack() as stack:
        clients = {
            (i.name, port): await stack.enter_async_context(
                rollout.site.host_of(i.name).http(i.address, port)
            )
            for i in serving
            for port in i.api_ports
        }

        async def read() -> dict[str, Counts]:
            asked = [
                _page(rollout, i.name, clients[i.name, port], f"http://{i.address}:{port}/metrics")
                for i in serving
                for port in i.api_ports
            ]
            pages = dict(zip(clients, await asyncio.gather(*asked), strict=True))
            return {
                i.name: _counts(rollout, [pages[i.name, port] for port in i.api_ports])
                for i in serving
            }

        yield read


async def _page(
    rollout: Rollout, instance: str, client: httpx.AsyncClient, url: str
) -> metrics.Samples:
    try:
        answer = await client.get(url, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        message = f"expected an answer from {url}, found none ({error or type(error).__name__})"
        raise _failed(rollout, message, f"see the log of {instance}") from error
    return metrics.parse(answer.text) if answer.status_code == 200 else {}


def _counts(rollout: Rollout, pages: Sequence[metrics.Samples]) -> Counts:
    counters = rollout.site.engine.COUNTERS
    return Counts(
        served=metrics.total(pages, counters.served),
        kv_tokens=metrics.total(pages, counters.kv_tokens),
        kv_bytes=metrics.total(pages, counters.kv_bytes),
    )


async def _settled(
    read: Callable[[], Awaitable[dict[str, Counts]]],
    before: Mapping[str, Counts],
    serving: Sequence[Instance],
) -> dict[str, Counts]:
    """The counters once they show the request; servers count a little later than they answer."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while True:
        after = await read()
        shown = {
            i.role: True
            for i in serving
            if _moved(before, after, i.name, "served")
            and (i.role == "prefill" or _all_moved(before, after, i.name))
        }
        silent = all(counts.kv_tokens is None for counts in after.values())
        if len(shown) == 2 or silent or time.monotonic() > deadline:
            return after
        await asyncio.sleep(POLL_INTERVAL_S)


def not_counted(
    counters: Counters,
    serving: Sequence[Instance],
    after: Mapping[str, Counts],
    answers: Sequence[Answer],
) -> str:
    """Why the counters can prove nothing; empty if they can. Pure."""
    # Some servers show a counter only once it has counted, so one that is left out shows none.
    for role, kind, counter in (
        ("prefill", "served", counters.served),
        ("decode", "served", counters.served),
        ("decode", "kv_tokens", counters.kv_tokens),
    ):
        names = [i.name for i in serving if i.role == role]
        if all(getattr(after[name], kind) is None for name in names):
            return f"{', '.join(names)} count{'' if names[1:] else 's'} no {counter.name}"
    said = all(answer.prompt_tokens for answer in answers)
    return "" if said else "the answer does not say how long the prompt is"


def handover(
    serving: Sequence[Instance],
    before: Mapping[str, Counts],
    after: Mapping[str, Counts],
    answers: Sequence[Answer],
) -> Handover:
    """The way of the requests between two readings. Pure."""
    decode = [i for i in serving if i.role == "decode"]
    counted = [i for i in decode if after[i.name].kv_bytes is not None]
    moved = sum(_moved(before, after, i.name, "kv_bytes") for i in counted)
    served = {
        role: ", ".join(
            f"{i.name} ({i.host})"
            for i in serving
            if i.role == role and _moved(before, after, i.name, "served")
        )
        for role in ("prefill", "decode")
    }
    return Handover(
        prefill=served["prefill"],
        decode=served["decode"],
        requests=len(answers),
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in answers),
        kv_tokens=int(sum(_moved(before, after, i.name, "kv_tokens") for i in decode)),
        kv_bytes=int(moved) if counted else None,
    )


def _check(rollout: Rollout, answers: Sequence[Answer], ways: Sequence[Handover]) -> None:
    way = ways[-1]
    if not way.complete:
        raise _failed(
            rollout,
            f"expected decode to get the KV of the prompt's {way.prompt_tokens} tokens from a "
            f"prefill, found that it computed it itself: {way}",
            "see whether the proxy passes kv_transfer_params on, and decode's log",
        )
    other = next((answer.text for answer in answers if answer.text != answers[0].text), None)
    if other is not None:
        raise _failed(
            rollout,
            f"expected the same answer at temperature 0 whichever prefill made the KV, found "
            f"{answers[0].text!r} by {ways[0].prefill} and {other!r} by {way.prefill}",
            "see whether all instances have the same model files",
        )


def _all_moved(before: Mapping[str, Counts], after: Mapping[str, Counts], name: str) -> bool:
    counted = [c for c in ("kv_tokens", "kv_bytes") if getattr(after[name], c) is not None]
    return all(_moved(before, after, name, counter) for counter in counted)


def _moved(
    before: Mapping[str, Counts], after: Mapping[str, Counts], name: str, counter: str
) -> float:
    now, then = getattr(after[name], counter), getattr(before[name], counter)
    return float((now or 0) - (then or 0))


def _failed(rollout: Rollout, message: str, hint: str) -> SmokeTestFailed:
    proxy = rollout.site.topology.proxy
    where = rollout.site.host(proxy.host).where
    return SmokeTestFailed(message, host=where, instance=proxy.name, hint=hint)
