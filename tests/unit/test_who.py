"""Who started a run, why, and how it is named."""

from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import CreatedBy, FlowRun

from pd_deploy.flows.publish import given_name
from pd_deploy.flows.run import FLEET, LONGEST, one_line, starter

RECOVER = CreatedBy(id=uuid4(), type="AUTOMATION", display_value="recover qwq")


@pytest.mark.parametrize(
    ("run", "who"),
    [
        ({"deployment_id": uuid4(), "auto_scheduled": True}, "the schedule"),
        ({"deployment_id": uuid4(), "tags": [FLEET]}, FLEET),
        ({"deployment_id": uuid4(), "created_by": RECOVER}, "automation 'recover qwq'"),
        ({"deployment_id": uuid4()}, "hand"),
        ({}, "alice@ctl-1"),
    ],
    ids=["schedule", "fleet", "automation", "the UI", "at a prompt"],
)
def test_who_started_a_run_is_named(
    monkeypatch: pytest.MonkeyPatch, run: dict[str, Any], who: str
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    monkeypatch.setattr("socket.gethostname", lambda: "ctl-1")
    assert starter(FlowRun(flow_id=uuid4(), **run)) == who


@pytest.mark.parametrize("name", ["more KV cache", "ticket-4711", "qwq 11-27", "hotfix", "a-b-c"])
def test_a_name_that_somebody_gave_a_run_stays(name: str) -> None:
    assert given_name(name) == name


@pytest.mark.parametrize("name", ["brawny-catfish", "Sleek-Eel", ""])
def test_a_name_of_prefects_own_making_does_not(name: str) -> None:
    assert given_name(name) == ""


def test_a_message_is_one_line_that_records_have_room_for() -> None:
    assert one_line("  more\n\tKV cache ") == "more KV cache"
    assert len(one_line("x" * 5000)) == LONGEST
