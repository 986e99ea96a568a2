"""Asking a server or the proxy, and reading its answer, whole or streamed."""

import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from pd_deploy.errors import headline
from pd_deploy.steps.verify.requests import CHAT

SHOWN = 300
"""Characters of an unexpected answer that messages repeat."""


class NoAnswer(Exception):
    """What came in place of an answer, in words; `status` is its HTTP status if there was one."""

    def __init__(self, found: str, status: int | None = None) -> None:
        super().__init__(found)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What a request gave.

    Attributes:
        text: all of the answer.
        prompt_tokens: length of the prompt, if the answer says it.
        reason: why it ended, `stop` or `length`.
        seconds: how long it took.
        document: the body; empty if it was streamed.
    """

    text: str
    prompt_tokens: int | None
    reason: str
    seconds: float
    document: Mapping[str, Any]


async def ask(
    client: httpx.AsyncClient,
    url: str,
    body: Mapping[str, Any],
    *,
    timeout: float,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Ask for a completion or a chat; return the answer.

    Args:
        timeout: seconds without a byte of the answer.

    Raises:
        NoAnswer: no connection, an error, or something that is no completion.
    """
    begin = time.monotonic()
    answer = await _posted(client, url, body, timeout, headers)
    if answer.status_code != 200:
        found = f"status {answer.status_code}: {answer.text[:SHOWN]!r}"
        raise NoAnswer(found + _of_a_key(client, answer), answer.status_code)
    try:
        read = streamed if body.get("stream") else whole
        return read(answer.text, url.endswith(CHAT), time.monotonic() - begin)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise NoAnswer(f"{answer.text[:SHOWN]!r}") from None


def _of_a_key(client: httpx.AsyncClient, answer: httpx.Response) -> str:
    """Say what a refusal has to do with the key that clients send."""
    if answer.status_code not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return ""
    if "Authorization" in client.headers:
        return ", to the key of `api_key`"
    return ", without a key: `api_key` in the file says where pd-deploy takes one from"


async def _posted(
    client: httpx.AsyncClient,
    url: str,
    body: Mapping[str, Any],
    timeout: float,
    headers: Mapping[str, str] | None,
) -> httpx.Response:
    """Post a request; post it again on a new connection if the first one is lost, because servers
    may close an idle connection just when it is used again."""
    send = functools.partial(client.post, url, json=body, timeout=timeout, headers=headers)
    try:
        try:
            return await send()
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            return await send()
    except httpx.HTTPError as error:
        raise NoAnswer(no_answer(error, timeout)) from error


def no_answer(error: httpx.HTTPError, seconds: float) -> str:
    """Say what came in place of an answer that might take so long."""
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {seconds:g} s"
    return f"no answer ({headline(error)})"


def whole(text: str, chat: bool, seconds: float) -> Answer:
    """Parse an answer that came in one piece.

    Raises:
        NoAnswer, ValueError, LookupError, TypeError, AttributeError: it is no completion.
    """
    document = json.loads(text)
    choice = document["choices"][0]
    content = _said(choice["message"]) if chat else choice["text"]
    tokens = (document.get("usage") or {}).get("prompt_tokens")
    return _answer(content, choice["finish_reason"], tokens, seconds, document)


def streamed(text: str, chat: bool, seconds: float) -> Answer:
    """Parse an answer that came in pieces; see `whole`."""
    chunks = list(_chunks(text.splitlines()))
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    content = "".join(_said(choice["delta"]) if chat else choice["text"] for choice in choices)
    reason = next(
        (choice["finish_reason"] for choice in choices if choice.get("finish_reason")), None
    )
    return _answer(content, reason, None, seconds, {})


def _chunks(lines: Iterable[str]) -> Iterator[Any]:
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise ValueError("it ended without [DONE]")


def _said(message: Mapping[str, Any]) -> str:
    """Return a message's content; a reasoning model has its thoughts in a field of their own."""
    parts = (message.get(key) for key in ("reasoning_content", "reasoning", "content"))
    return "".join(part for part in parts if isinstance(part, str))


def _answer(
    content: Any, reason: Any, tokens: Any, seconds: float, document: Mapping[str, Any]
) -> Answer:
    if not isinstance(content, str) or reason not in ("stop", "length"):
        raise NoAnswer(f"the text {content!r} that ended because of {reason!r}")
    return Answer(content, tokens if isinstance(tokens, int) else None, reason, seconds, document)
