"""OpenAI request bodies, read as vLLM reads them."""

import json
from typing import Any

from standin.engine import Request
from standin.model import tokenize


class BadRequest(Exception):
    """A request the API rejects.

    Args:
        message: for the client.
        status: HTTP status.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def parse_body(raw: bytes) -> dict[str, Any]:
    """Parse the body as an object.

    Raises:
        BadRequest: it is not a JSON object.
    """
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequest(f"body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("body must be a JSON object")
    return body


def check_model(body: dict[str, Any], served: str) -> None:
    """Answer a wrong model name with 404, as vLLM does."""
    name = body.get("model", served)
    if name != served:
        raise BadRequest(f"The model `{name}` does not exist.", 404)


def to_request(body: dict[str, Any], chat: bool, request_id: str, max_model_len: int) -> Request:
    """Read the tokens and limits of a completion.

    Raises:
        BadRequest: a missing or malformed field, or more tokens than max_model_len.
    """
    if body.get("stream_options") and not body.get("stream"):
        raise BadRequest("Stream options can only be defined when `stream=True`.")
    if body.get("n", 1) != 1:
        raise BadRequest("the stand-in generates one choice only (n=1)")
    prompt_ids = tokenize(_chat_text(body)) if chat else _prompt_ids(body.get("prompt"))
    if not prompt_ids:
        raise BadRequest("the prompt is empty")
    max_tokens = _max_tokens(body, chat, max_model_len - len(prompt_ids))
    if len(prompt_ids) + max_tokens > max_model_len or max_tokens < 1:
        raise BadRequest(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{len(prompt_ids) + max_tokens} tokens ({len(prompt_ids)} in the messages, "
            f"{max_tokens} in the completion)."
        )
    kv_params = body.get("kv_transfer_params")
    if kv_params is not None and not isinstance(kv_params, dict):
        raise BadRequest("kv_transfer_params must be an object")
    return Request(request_id, prompt_ids, max_tokens, bool(body.get("ignore_eos")), kv_params)


def _prompt_ids(prompt: Any) -> list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return tokenize(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise BadRequest("prompt must be a text, a list with one text, or a list of token ids")


def _chat_text(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of messages")
    try:
        return "\n".join(f"{m['role']}: {_content(m['content'])}" for m in messages)
    except (KeyError, TypeError):
        raise BadRequest("every message needs a role and a content") from None


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _max_tokens(body: dict[str, Any], chat: bool, room: int) -> int:
    # For chat the newer field wins, which is why a proxy that rewrites only max_tokens makes
    # prefill generate the whole answer (5.4).
    value = body.get("max_completion_tokens") if chat else None
    if value is None:
        value = body.get("max_tokens")
    if value is None:
        return room if chat else min(16, max(room, 1))
    if type(value) is not int:
        raise BadRequest(f"max_tokens must be a number, found {value!r}")
    return value
