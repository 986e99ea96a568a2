"""What the Prefect server is told of dead runs, and which runs recovery leaves alone."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import State
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Pending, Running

from pd_deploy.flows import dead
from pd_deploy.flows.dead import why_untouched
from pd_deploy.hosts.lease import Owner, this_process

NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ({"run_count": 1}, ""),
        ({"run_count": 1, "parameters": {"dry_run": False}}, ""),
        ({"run_count": 1, "parameters": {"dry_run": True}}, "run 'x' was a dry run"),
        ({"start_time": NOW}, "run 'x' never started"),
    ],
)
def test_a_run_that_cannot_have_changed_a_host_is_known(run: dict[str, object], why: str) -> None:
    """A run that ends has a start time even if it was never running: Prefect sets it then."""
    assert why_untouched(FlowRun(flow_id=uuid4(), name="x", **run)) == why


class Prefect:
    """A server that knows one run, or fails."""

    def __init__(self, run: FlowRun | None, fault: Exception | None = None) -> None:
        self.run = run
        self.fault = fault
        self.states = list[State[None]]()

    async def __aenter__(self) -> "Prefect":
        if self.fault:
            raise self.fault
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def read_flow_run(self, known: UUID) -> FlowRun:
        if self.run is None or known != self.run.id:
            raise ObjectNotFound(Exception("no such run"))
        return self.run

    async def set_flow_run_state(self, _: UUID, state: State[None]) -> None:
        self.states.append(state)


def flow_run(state: State[None], **values: object) -> FlowRun:
    return FlowRun(flow_id=uuid4(), name="x", state=state, **values)


def owner(flow_run: str) -> Owner:
    return Owner(deployment="d", run="run x", flow_run=flow_run, **this_process())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    monkeypatch.setattr(dead, "get_run_logger", lambda: logging.getLogger("of the run"))
    with caplog.at_level("INFO", logger="of the run"):
        yield caplog


@pytest.mark.parametrize(
    ("state", "crashed"), [(Running(), True), (Pending(), True), (Completed(), False)]
)
async def test_only_a_run_that_is_taken_for_alive_is_crashed(
    monkeypatch: pytest.MonkeyPatch, said: Any, state: State[None], crashed: bool
) -> None:
    run = flow_run(state)
    server = Prefect(run)
    monkeypatch.setattr(dead, "get_client", lambda: server)
    await dead.bury(owner(str(run.id)), "run y")
    assert [one.is_crashed() for one in server.states] == [True] * crashed
    assert all("run y took the lease over" in str(one.message) for one in server.states)
    assert ("run x is dead" in said.text) is crashed


@pytest.mark.parametrize("known", [str(uuid4()), "None"], ids=["another run", "no run"])
async def test_a_run_that_the_server_does_not_know_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, said: Any, known: str
) -> None:
    server = Prefect(None)
    monkeypatch.setattr(dead, "get_client", lambda: server)
    await dead.bury(owner(known), "run y")
    assert not server.states
    assert not said.records


async def test_a_server_that_does_not_answer_keeps_no_run_from_its_work(
    monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    monkeypatch.setattr(dead, "get_client", lambda: Prefect(None, OSError("refused")))
    await dead.bury(owner(str(uuid4())), "run y")
    assert "the Prefect server could not be told: refused" in said.text
    assert await dead.untouched(f"prefect.flow-run.{uuid4()}") == ""
    assert "is not known: refused" in said.text


async def test_what_is_known_of_a_run_is_asked_of_the_server(
    monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    run = flow_run(Crashed(), run_count=1, parameters={"dry_run": True})
    monkeypatch.setattr(dead, "get_client", lambda: Prefect(run))
    assert await dead.untouched(f"prefect.flow-run.{run.id}") == "run 'x' was a dry run"
