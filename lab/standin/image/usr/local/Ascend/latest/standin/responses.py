"""OpenAI response bodies."""

import time
from typing import Any

from standin.engine import Generation


class Shape:
    """The body's form for one request: text completion or chat, whole or in chunks."""

    def __init__(self, chat: bool, request_id: str, model: str) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, generation: Generation) -> dict[str, Any]:
        """Build the body of an answer that is not streamed."""
        text = "".join(generation.texts)
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": text}}
        return {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [_choice(content, generation.finish_reason)],
            "usage": usage(generation),
            "kv_transfer_params": generation.kv_params,
        }

    def chunks(self, generation: Generation, with_usage: bool) -> Any:
        """Yield the bodies of a streamed answer, one per token; the last may be the usage."""
        if self._chat:
            yield self._chunk({"delta": {"role": "assistant", "content": ""}}, None)
        for number, text in enumerate(generation.texts, start=1):
            content = {"delta": {"content": text}} if self._chat else {"text": text}
            last = number == generation.completion_tokens
            yield self._chunk(content, generation.finish_reason if last else None)
        if not generation.completion_tokens:
            content = {"delta": {}} if self._chat else {"text": ""}
            yield self._chunk(content, generation.finish_reason)
        if with_usage:
            yield {**self._chunk({}, None), "choices": [], "usage": usage(generation)}

    def _chunk(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [_choice(content, finish_reason)]}


def usage(generation: Generation) -> dict[str, int]:
    """Count tokens."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def error(message: str, status: int) -> dict[str, Any]:
    """Build an error body as vLLM 0.9 sends it."""
    kinds = {400: "BadRequestError", 404: "NotFoundError"}
    kind = kinds.get(status, "InternalServerError")
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
