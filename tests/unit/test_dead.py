"""What the Prefect server is told of dead runs, and which runs recovery leaves alone."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import State
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import FlowRun, TaskRun
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
        self.reports = dict[str, str]()

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

    async def read_artifacts(self, *, artifact_filter: ArtifactFilter) -> list[str]:
        assert artifact_filter.flow_run_id
        assert self.run
        assert artifact_filter.flow_run_id.any_ == [self.run.id]
        assert artifact_filter.key
        return [key for key in artifact_filter.key.any_ or [] if key in self.reports]

    async def read_task_runs(self, **_: object) -> list[TaskRun]:
        return [
            step("launch d0", Running(), 2.0),
            step("launch p0", Completed(), 1.0),
            step("start p0", Pending(), None),
        ]

    async def create_artifact(self, artifact: ArtifactCreate) -> None:
        assert self.run
        assert artifact.flow_run_id == self.run.id
        assert artifact.key
        self.reports[artifact.key] = str(artifact.data)


def step(name: str, state: State[None], began: float | None) -> TaskRun:
    """A step that took 1.5 s, or takes that long already."""
    start = None if began is None else NOW + timedelta(seconds=began)
    return TaskRun(
        name=name,
        task_key=name,
        dynamic_key="0",
        state=state,
        state_name=state.name,
        start_time=start,
        estimated_run_time=timedelta(seconds=1.5),
    )


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


async def test_a_dead_run_has_a_report_of_what_it_had_begun(
    monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    server = Prefect(flow_run(Crashed(), parameters={"file": "d.yaml"}))
    assert server.run
    monkeypatch.setattr(dead, "get_client", lambda: server)
    await dead.bury(owner(str(server.run.id)), "run y")
    assert not said.records
    text = server.reports["d-report"]
    rows = [line for line in text.splitlines() if " launch " in line or " start " in line]
    assert [row.split("|", 2)[2] for row in rows] == [
        " launch p0 | completed | 1.5 s |",
        " launch d0 | under way |  |",
    ]
    assert "run y took the lease over" in text
    assert "`pd-deploy status d.yaml`" in text
    server.reports["d-report"] = "its own"
    await dead.bury(owner(str(server.run.id)), "run z")
    assert server.reports["d-report"] == "its own"


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
