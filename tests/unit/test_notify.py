"""`pd-deploy notify`: the automations on a Prefect server, and the block that they send by."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound

from pd_deploy.cli import notify
from pd_deploy.errors import PdDeployError


class Server:
    """What a Prefect server has of blocks and automations."""

    def __init__(self) -> None:
        self.blocks = {
            "slack-webhook/ops": self.block("slack-webhook", "ops", ["notify"]),
            "custom-webhook/other": self.block("custom-webhook", "other", ["notify"]),
            "pd-deploy-ssh/ssh": self.block("pd-deploy-ssh", "ssh", []),
        }
        self.automations: dict[UUID, AutomationCore] = {}

    def block(self, slug: str, name: str, capabilities: list[str]) -> Any:
        return SimpleNamespace(
            id=uuid4(),
            name=name,
            block_schema=SimpleNamespace(capabilities=capabilities),
            block_type=SimpleNamespace(slug=slug),
        )

    async def read_block_document_by_name(self, name: str, slug: str, **_: object) -> Any:
        try:
            return self.blocks[f"{slug}/{name}"]
        except KeyError:
            raise ObjectNotFound(httpx.HTTPError("404")) from None

    async def read_block_document(self, block_id: UUID, _: bool) -> Any:
        return next(block for block in self.blocks.values() if block.id == block_id)

    async def read_automations_by_name(self, name: str) -> list[Automation]:
        return [
            Automation(id=key, **one.model_dump())
            for key, one in self.automations.items()
            if one.name == name
        ]

    async def create_automation(self, automation: AutomationCore) -> None:
        self.automations[uuid4()] = automation

    async def update_automation(self, key: UUID, automation: AutomationCore) -> None:
        self.automations[key] = automation

    async def delete_automation(self, key: UUID) -> None:
        del self.automations[key]


class Closed(io.StringIO):
    """An output that nobody reads any more."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()

    @contextmanager
    def served() -> Iterator[None]:
        yield

    @asynccontextmanager
    async def client() -> Any:
        yield server

    monkeypatch.setattr(notify, "served", served)
    monkeypatch.setattr(notify, "get_client", client)
    return server


@pytest.mark.parametrize("call", [lambda: notify.send("slack-webhook/ops"), notify.stop])
def test_whoever_reads_no_more_gets_all_of_them(
    server: Server, monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]
) -> None:
    """As `pd-deploy notify slack-webhook/ops | head -1` does."""
    if call is notify.stop:
        notify.send("slack-webhook/ops")
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        call()
    count = len(notify.automations(notify.NOBODY))
    assert len(server.automations) == (0 if call is notify.stop else count)


def test_they_are_made_once_and_send_by_the_latest_block(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was paused stays so; those of others are left alone."""
    notify.show()
    assert "tells of a rollback: not made" in capsys.readouterr().out
    notify.send("slack-webhook/ops")
    first = list(server.automations)
    other = server.automations[first[0]].model_copy(update={"name": "another"})
    server.automations[key := uuid4()] = other
    server.automations[first[1]].enabled = False
    notify.send("custom-webhook/other")
    assert list(server.automations) == [*first, key]
    assert [server.automations[one].enabled for one in first[:3]] == [True, False, True]
    capsys.readouterr()
    notify.show()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines[:3]] == [
        "by custom-webhook/other",
        "by custom-webhook/other, paused",
        "by custom-webhook/other",
    ]
    notify.stop()
    assert list(server.automations) == [key]


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ("slack-webhook/none", "found none on the Prefect server"),
        ("slack-webhook", "expected a notification block slack-webhook, found none"),
        ("pd-deploy-ssh/ssh", "expected a block that sends notifications, found pd-deploy-ssh/ssh"),
    ],
)
def test_a_block_that_cannot_send_is_refused_and_nothing_is_made(
    server: Server, block: str, told: str
) -> None:
    with pytest.raises(PdDeployError, match=told):
        notify.send(block)
    assert not server.automations
