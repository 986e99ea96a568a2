"""Handing a prompt's KV over from a prefill to a decode, both asked directly.

A proxy chooses by load: the one that omni-infer starts sends single requests always to the first
prefill, and bursts to others only while earlier prompts are still being read. So each prefill and
each decode is asked by itself, in the engine's own protocol, and the proxy has to prove only what
is its own: that it passes KV on.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pd_deploy.engines.base import Engine
from pd_deploy.hosts.concurrent import together
from pd_deploy.steps.verify.answers import Answer, NoAnswer
from pd_deploy.steps.verify.servers import Counts, Server

TRIES = 3
"""How often a request is repeated whose counters show somebody else's requests as well."""


@dataclass(frozen=True)
class Handover:
    """The way of one request's KV.

    Attributes:
        prefill: the server that made it, as `p0 (a)` with its host; empty if none did.
        decode: the server that used it.
        prompt_tokens: length of the prompt.
        kv_tokens: tokens of it whose KV decode says it got from a prefill.
        kv_bytes: what was moved for that; None where the engine does not count it.
        alone: whether the counters show no other request.
        proxied: whether the proxy handed it over; else both were asked directly.
    """

    prefill: str
    decode: str
    prompt_tokens: int
    kv_tokens: int
    kv_bytes: int | None
    alone: bool = True
    proxied: bool = False

    @property
    def complete(self) -> bool:
        """Whether decode computed nothing of the prompt, but perhaps its last token: the first
        token of the answer follows from that one."""
        needed = max(self.prompt_tokens - 1, 1)
        return bool(self.prefill) and self.kv_tokens >= needed and self.kv_bytes != 0

    def __str__(self) -> str:
        moved = "" if self.kv_bytes is None else f", {self.kv_bytes} bytes"
        return (
            f"KV of {self.kv_tokens} of {self.prompt_tokens} prompt tokens went from "
            f"{self.prefill or 'no prefill'} to {self.decode or 'no decode'}"
            f"{' through the proxy' if self.proxied else ''}{moved}"
        )


@dataclass(frozen=True)
class Exchange:
    """One prompt through a prefill and a decode.

    `way` is None where it can't be told: decode does not count, or the answer does not say how
    long the prompt is. `offered` is false where prefill had nothing to hand over, because the
    answer was at its end.
    """

    prefill: Server
    decode: Server
    prompt: str
    answer: Answer
    way: Handover | None
    offered: bool = True


def pairs(prefill: Sequence[Server], decode: Sequence[Server]) -> list[tuple[Server, Server]]:
    """As few pairs as have every prefill and every decode in them; the first ones have each
    prefill once."""
    return [
        (prefill[index % len(prefill)], decode[index % len(decode)])
        for index in range(max(len(prefill), len(decode)))
    ]


async def hand_over(
    engine: Engine, prefill: Server, decode: Server, body: Mapping[str, Any]
) -> Exchange:
    """Has a prefill make the KV of a prompt and a decode answer with it.

    Each is asked for one thing at a time. Where the counters show that others ask the decode as
    well, it is tried again.

    Raises:
        SmokeTestFailed: one of them does not answer, or decode did not use prefill's KV.
    """
    for _ in range(TRIES):
        exchange = await _exchange(engine, prefill, decode, body)
        if exchange.way is None or exchange.way.alone:
            break
    if exchange.way and not exchange.way.complete:
        raise decode.failed(
            f"expected decode to get the KV of the prompt's {exchange.way.prompt_tokens} tokens "
            f"from a prefill, found that it computed it itself: {exchange.way}",
        )
    return exchange


async def ask_alone(engine: Engine, decode: Server, body: Mapping[str, Any]) -> Answer:
    """Ask a decode to answer a prompt without any prefill's KV.

    Raises:
        NoAnswer: it can't, or does not want to.
    """
    async with decode.turn:
        return await decode.ask(
            {**body, **engine.cache_busting_fields(str(uuid.uuid4()))}, str(uuid.uuid4())
        )


async def _exchange(
    engine: Engine, prefill: Server, decode: Server, body: Mapping[str, Any]
) -> Exchange:
    request_id = str(uuid.uuid4())
    body = {**body, **engine.cache_busting_fields(request_id)}
    prompt = str(body["prompt"])
    of_prefill = engine.prefill_request(prefill.instance, body, request_id)
    if engine.AT_ONCE:
        answer, since = await _at_once(engine, prefill, decode, of_prefill, request_id)
        way = way_of(prefill.name, decode.name, answer.prompt_tokens, since)
        return Exchange(prefill, decode, prompt, answer, way)
    async with prefill.turn:
        made = await _made(prefill, of_prefill, request_id)
    request = engine.decode_request(body, made.document)
    if request is None:
        if made.reason == "stop":
            return Exchange(prefill, decode, prompt, made, None, offered=False)
        raise prefill.failed(
            "expected an answer that says where decode finds the prompt's KV, found no "
            f"{engine.HANDOVER_FIELDS} in it",
            "check whether the server runs with --kv-transfer-config, and its log",
        )
    async with decode.turn:
        before = await decode.counts()
        answer = await _by_kv_of(prefill, decode, request, request_id)
        since = await decode.counted_since(before)
    way = way_of(prefill.name, decode.name, answer.prompt_tokens, since)
    return Exchange(prefill, decode, prompt, answer, way)


async def _at_once(
    engine: Engine, prefill: Server, decode: Server, request: Mapping[str, Any], request_id: str
) -> tuple[Answer, Counts]:
    """Ask a prefill and a decode that wait for each other; when one refuses, give up the other."""
    of_decode = engine.decode_request(request, {}) or request
    async with prefill.turn, decode.turn:
        before = await together([prefill.counts(), decode.counts()])
        _, answer = await together(
            [
                _made(prefill, request, request_id),
                _by_kv_of(prefill, decode, of_decode, request_id),
            ]
        )
        sent, since = await together(
            [prefill.counted_since(before[0]), decode.counted_since(before[1])]
        )
    if engine.COUNTERS.kv_bytes_of == "prefill":
        since = replace(since, kv_bytes=sent.kv_bytes)
    return answer, since


async def _made(prefill: Server, request: Mapping[str, Any], request_id: str) -> Answer:
    try:
        return await prefill.ask(request, request_id)
    except NoAnswer as error:
        raise prefill.refused("a completion", error) from error


async def _by_kv_of(
    prefill: Server, decode: Server, request: Mapping[str, Any], request_id: str
) -> Answer:
    try:
        return await decode.ask(request, request_id)
    except NoAnswer as error:
        raise decode.refused(f"an answer by the KV that {prefill.name} made", error) from error


def way_of(prefill: str, decode: str, prompt_tokens: int | None, since: Counts) -> Handover | None:
    """Tell where a request's KV came from, by decode's counts; None if that is unknown. Pure."""
    if prompt_tokens is None or since.kv_tokens is None:
        return None
    return Handover(
        prefill=prefill,
        decode=decode,
        prompt_tokens=prompt_tokens,
        kv_tokens=int(since.kv_tokens),
        kv_bytes=None if since.kv_bytes is None else int(since.kv_bytes),
        alone=(since.served or 0) <= 1 and since.kv_tokens <= prompt_tokens,
    )
