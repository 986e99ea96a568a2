"""What the client of a Docker engine says of one that answers nothing, late, or not in time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pd_deploy.errors import ConnectionDropped, PdDeployError, TimedOut
from pd_deploy.hosts import docker_client
from pd_deploy.hosts.docker_client import DockerClient
from pd_deploy.hosts.docker_socket import DockerSocket
from pd_deploy.hosts.tunnel import Stream

VERSION = {"Version": "20.10", "ApiVersion": "1.41", "MinAPIVersion": "1.12"}


class Far:
    """The far end of a connection to an engine, which answers requests by their path."""

    def __init__(self, answer: Callable[[str], bytes | None]) -> None:
        self._answer = answer
        self._said: asyncio.Queue[bytes] = asyncio.Queue()

    def write(self, data: bytes) -> None:
        said = self._answer(data.split()[1].decode())
        if said is not None:
            self._said.put_nowait(said)

    async def drain(self) -> None: ...

    def close(self) -> None: ...

    async def read(self, _: int = -1) -> bytes:
        return await self._said.get()


def client(answer: Callable[[str], bytes | None]) -> DockerClient:
    @contextlib.asynccontextmanager
    async def stream() -> AsyncIterator[Stream]:
        far = Far(answer)
        yield far, far

    async def nothing() -> None: ...

    socket = cast(DockerSocket, SimpleNamespace(stream=stream, aclose=nothing))
    return DockerClient(socket, "a (10.0.0.1)")


def reply(document: object) -> bytes:
    body = json.dumps(document).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def fault(engine: DockerClient) -> PdDeployError:
    try:
        with pytest.raises(PdDeployError) as raised:
            await engine.info()
    finally:
        await engine.aclose()
    return raised.value


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (lambda _: None, TimedOut, "ask for its version: Docker did not answer within 0.2 s"),
        (
            lambda path: reply(VERSION) if path == "/version" else None,
            TimedOut,
            "info: Docker did not answer within ",
        ),
        (lambda _: b"", ConnectionDropped, "the connection to the Docker engine was lost"),
    ],
    ids=["hangs", "hangs later", "hangs up"],
)
async def test_an_engine_that_hangs_is_told_from_a_connection_that_is_lost(
    monkeypatch: pytest.MonkeyPatch, answer: Any, error: type[PdDeployError], said: str
) -> None:
    monkeypatch.setattr(docker_client, "FIRST_ANSWER_S", 0.2)
    monkeypatch.setattr(docker_client, "CALL_TIMEOUT_S", 0.2)
    told = await fault(client(answer))
    assert type(told) is error
    assert said in told.message
    assert told.host == "a (10.0.0.1)"
