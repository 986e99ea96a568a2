"""Reading answers, whole and streamed, of completions and chats."""

import json
from typing import Any

import httpx
import pytest

from pd_deploy.steps.verify.answers import Answer, NoAnswer, ask
from pd_deploy.steps.verify.requests import CHAT, COMPLETIONS

USAGE = {"prompt_tokens": 7}


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "finish_reason": "length", **fields}


async def read(text: str, path: str = COMPLETIONS, status: int = 200, **body: Any) -> Answer:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
    async with httpx.AsyncClient(transport=transport) as client:
        return await ask(client, f"http://server:1{path}", body, timeout=1)


def document(**fields: Any) -> str:
    return json.dumps({"choices": [choice(**fields)], "usage": USAGE})


def events(*chunks: dict[str, Any], done: bool = True) -> str:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""])


async def test_a_completion() -> None:
    found = await read(document(text=" yes"))
    assert (found.text, found.prompt_tokens, found.reason) == (" yes", 7, "length")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "hello"}, "hello"),
        ({"content": None, "reasoning_content": "Okay"}, "Okay"),
        ({"reasoning": "Well", "content": " so"}, "Well so"),
    ],
)
async def test_a_chat_with_or_without_reasoning(message: dict[str, Any], text: str) -> None:
    assert (await read(document(message=message), CHAT)).text == text


async def test_a_streamed_completion_and_chat() -> None:
    text = events(
        {"choices": [choice(text="a", finish_reason=None)]},
        {"choices": [choice(text="b")]},
        {"choices": [], "usage": USAGE},
    )
    assert (await read(text, stream=True)).text == "ab"
    text = events(
        {"choices": [choice(delta={"role": "assistant"}, finish_reason=None)]},
        {"choices": [choice(delta={"content": "c"}, finish_reason="stop")]},
    )
    assert (await read(text, CHAT, stream=True)).text == "c"


@pytest.mark.parametrize(
    ("text", "status", "body", "found"),
    [
        ("0a1b", 200, {}, "'0a1b'"),
        ("[]", 200, {}, "'[]'"),
        ('{"choices": []}', 200, {}, "'{\"choices\": []}'"),
        ("no", 503, {}, "status 503: 'no'"),
        (document(text=None), 200, {}, "the text None"),
        (document(text="x", finish_reason="abort"), 200, {}, "because of 'abort'"),
        (events({"choices": [choice(text="a")]}, done=False), 200, {"stream": True}, "data: "),
        (events({"choices": [choice(text="a", finish_reason=None)]}), 200, {"stream": True},
         "because of None"),
    ],
)  # fmt: skip
async def test_what_is_no_answer_is_shown(
    text: str, status: int, body: dict[str, Any], found: str
) -> None:
    with pytest.raises(NoAnswer) as raised:
        await read(text, status=status, **body)
    assert found in str(raised.value)


async def test_no_connection_is_no_answer() -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(NoAnswer, match="no answer"):
            await ask(client, f"http://127.0.0.1:1{COMPLETIONS}", {}, timeout=1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (httpx.ReadTimeout(""), "no answer within 1 s"),
        (httpx.ReadError(""), "no answer (ReadError)"),
        (httpx.ConnectError("refused"), "no answer (refused)"),
    ],
)
async def test_what_came_in_place_of_an_answer_is_said(error: httpx.HTTPError, says: str) -> None:
    """Errors of httpx often have no text of their own."""

    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    async with httpx.AsyncClient(transport=httpx.MockTransport(fail)) as client:
        with pytest.raises(NoAnswer) as told:
            await ask(client, f"http://server:1{COMPLETIONS}", {}, timeout=1)
    assert str(told.value) == says
