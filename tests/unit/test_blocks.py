"""The blocks that a deployment names."""

import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prefect.blocks.core import Block

from pd_deploy.blocks import loading, opening, server
from pd_deploy.errors import InvalidInput
from tests.unit import example


async def test_unknown_blocks_of_both_kinds_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def missing(cls: type[Block], name: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(Block, "aload", classmethod(missing))
    deployment = example.service(
        {
            "registry": {"credentials": "one"},
            "ssh": {"credentials": "two"},
            "hosts": {"a": {"address": "10.0.0.1", "ssh": {"credentials": "three"}}},
            "api_key": {"credentials": "four"},
        }
    )
    with pytest.raises(InvalidInput) as caught:
        async with opening.open_session(deployment, with_key=True):
            pass
    assert {problem.key for problem in caught.value.problems} == {
        "ssh.credentials",
        "hosts.a.ssh.credentials",
        "registry.credentials",
        "api_key.credentials",
    }
    assert "expected a block secret/four, found none" in str(caught.value)
    for command in ("credentials registry one", "credentials ssh two", "credentials ssh three"):
        assert f"pd-deploy {command}" in str(caught.value)


class TestWithoutPrefect:
    """Commands that only look at hosts ask the server for blocks themselves."""

    @pytest.fixture(autouse=True)
    def prefect_not_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "prefect")
        monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api/")

    def answering(
        self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]
    ) -> None:
        client = httpx.AsyncClient
        monkeypatch.setattr(
            server.httpx,
            "AsyncClient",
            lambda **kwargs: client(transport=httpx.MockTransport(answer), **kwargs),
        )

    async def test_a_block_is_read_with_its_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[httpx.URL] = []

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request.url)
            return httpx.Response(200, json={"data": {"password": "secret", "jump_host": "j"}})

        self.answering(monkeypatch, answer)
        login = (await loading.ssh("pd-ssh", "ssh.credentials"))("root", 22)
        assert login.password == "secret"
        assert login.jump
        assert asked == [
            "http://prefect.example/api/block_types/slug/pd-deploy-ssh/block_documents/name/pd-ssh"
            "?include_secrets=true"
        ]

    @pytest.mark.parametrize(
        "answer",
        [
            httpx.Response(404, json={"detail": "Block document not found"}),
            httpx.Response(401),
            httpx.Response(200, text="<html>"),
            httpx.Response(200, json={"data": {"jump_port": "none"}}),
            httpx.Response(200, json=[]),
        ],
        ids=lambda answer: f"{answer.status_code} {answer.text[:8]}",
    )
    async def test_prefect_is_asked_where_the_server_does_not_just_give_it(
        self, monkeypatch: pytest.MonkeyPatch, answer: httpx.Response
    ) -> None:
        self.answering(monkeypatch, lambda _: answer)
        asked: list[Any] = []

        async def by_prefect(*args: object) -> None:
            asked.append(args)

        monkeypatch.setattr(loading, "_by_prefect", by_prefect)
        await loading.ssh("pd-ssh", "ssh.credentials")
        assert len(asked) == 1
