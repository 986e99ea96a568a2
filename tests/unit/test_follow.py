"""`pd-deploy follow`: what it says while a run waits, and of many tasks."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.filters import WorkQueueFilter
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.states import (
    AwaitingConcurrencySlot,
    Cancelled,
    Cancelling,
    Completed,
    Late,
    Paused,
    Pending,
    Running,
    Scheduled,
)

from pd_deploy.cli import run as following
from pd_deploy.errors import PdDeployError

RUN, QUEUE = UUID(int=1), UUID(int=3)
SOON = datetime.now(UTC) + timedelta(hours=1)


class Server:
    """A server on which a run stays in a state for some polls, and then completes."""

    def __init__(
        self,
        state: State[Any],
        *,
        ahead: str = "",
        queued: str = "",
        limit: int = 1,
        tasks: int = 0,
    ) -> None:
        self.state, self.polls, self.ahead = state, 20, ahead
        self.queued, self.limit = queued, limit
        self.tasks = [
            TaskRun(
                id=uuid4(),
                flow_run_id=RUN,
                task_key="x",
                dynamic_key=str(n),
                name=f"task {n}",
                state=Running(),
            )
            for n in range(tasks)
        ]

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def read_flow_run(self, _: UUID) -> FlowRun:
        self.polls -= 1
        state = self.state if self.polls > 0 else Completed(message="served")
        return FlowRun(
            id=RUN,
            flow_id=uuid4(),
            deployment_id=uuid4(),
            state=state,
            work_pool_name="pd-pool",
            work_queue_id=QUEUE if self.queued else None,
        )

    async def read_flow_runs(
        self, *, work_queue_filter: WorkQueueFilter | None = None, **_: object
    ) -> list[Any]:
        itself = SimpleNamespace(id=RUN, name="itself", state_name="Pending")
        name = self.queued if work_queue_filter else self.ahead
        other = SimpleNamespace(id=UUID(int=2), name=name, state_name="Pending")
        return [itself, other] if name else [itself]

    async def read_work_queue(self, queue: UUID) -> Any:
        assert queue == QUEUE
        return SimpleNamespace(id=QUEUE, name="hosts-a-b", concurrency_limit=self.limit)

    async def read_task_runs(self, *, limit: int, offset: int, **_: object) -> list[TaskRun]:
        assert limit <= 200  # Prefect's server refuses more
        return self.tasks[offset : offset + limit]


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Follows the run on a server; the lines printed."""

    def follow(server: Server) -> list[str]:
        monkeypatch.setattr(following, "get_client", lambda: server)
        monkeypatch.setattr(following, "POLL_INTERVAL_S", 0)
        assert asyncio.run(following._follow(RUN)) == 0
        return capsys.readouterr().out.splitlines()

    return follow


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (AwaitingConcurrencySlot(), "waits for its turn: another run of its deployment"),
        (Late(), "waits for a worker: none of pool pd-pool takes it → `prefect worker start"),
        (Scheduled(), "waits for a worker: none of pool pd-pool takes it"),
        (Scheduled(scheduled_time=SOON), f"waits until {SOON.astimezone():%Y-%m-%d %H:%M:%S}"),
        (Pending(), "waits for the worker of pool pd-pool that took it"),
        (Paused(), "waits for somebody to resume it"),
    ],
    ids=lambda value: value.name if isinstance(value, State) else "",
)
def test_a_run_that_waits_is_told_once_with_its_state(
    followed: Any, state: State[Any], says: str
) -> None:
    line, last = followed(Server(state))
    assert line.startswith(f"{state.name}: {says}")
    assert last == "Completed: served"


@pytest.mark.parametrize("state", [AwaitingConcurrencySlot(), Late()], ids=lambda s: s.name)
def test_who_is_ahead_of_a_run_is_named(followed: Any, state: State[Any]) -> None:
    """Also one that stayed Pending when its worker was killed."""
    line, _ = followed(Server(state, ahead="orphan"))
    assert line == (
        f"{state.name}: waits for run 'orphan' ({UUID(int=2)}), Pending, "
        "which works on the same deployment"
    )


def test_who_has_the_queue_of_a_run_s_hosts_is_named(followed: Any) -> None:
    line, _ = followed(Server(Late(), queued="neighbour"))
    assert line == (
        f"Late: waits for run 'neighbour' ({UUID(int=2)}), Pending, which has the queue hosts-a-b"
    )
    line, _ = followed(Server(Late(), queued="neighbour", limit=2))
    assert "none of pool pd-pool takes it" in line


def test_a_run_that_works_waits_for_nothing(followed: Any) -> None:
    assert followed(Server(State(type=StateType.RUNNING), ahead="x")) == ["Completed: served"]


def test_a_run_of_more_tasks_than_a_page_shows_all_of_them(followed: Any) -> None:
    shown = followed(Server(Running(), tasks=450))
    assert [line.split()[-1] for line in shown[:-1]] == [str(n) for n in range(450)]


@pytest.mark.parametrize("known", [True, False])
def test_without_an_id_the_latest_run_of_ours_is_followed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    server = Server(Running())
    asked: list[dict[str, Any]] = []

    async def read_flow_runs(**question: Any) -> list[Any]:
        asked.append(question)
        return [SimpleNamespace(id=RUN, name="qwq-3p1d 07-23 03:12:40")] if known else []

    monkeypatch.setattr(server, "read_flow_runs", read_flow_runs)
    monkeypatch.setattr(following, "get_client", lambda: server)
    monkeypatch.setattr(following, "served", contextlib.nullcontext)
    monkeypatch.setattr(following, "POLL_INTERVAL_S", 0)
    if not known:
        with pytest.raises(PdDeployError, match="expected a run of pd-deploy"):
            following.follow(None)
        return
    assert following.follow(None) == 0
    assert capsys.readouterr().out.startswith(f"run 'qwq-3p1d 07-23 03:12:40' ({RUN})\n")
    question = asked[0]
    assert "pd-deploy" in question["flow_filter"].name.any_
    assert "pd-health" not in question["flow_filter"].name.any_  # of which there is one a minute
    # One that a schedule has made for tomorrow is not the latest.
    before = question["flow_run_filter"].expected_start_time.before_
    assert abs((before - datetime.now(UTC)).total_seconds()) < 3600


@pytest.mark.parametrize(
    ("parameters", "code", "named"),
    [
        ({}, 0, ["pd-deploy status x.yaml"]),
        ({}, 1, ["pd-deploy status x.yaml"]),
        ({}, 6, ["pd-deploy status x.yaml", "pd-deploy logs x.yaml"]),
        ({"dry_run": True}, 0, ["pd-deploy deploy x.yaml"]),
    ],
)
def test_the_next_command_is_named(parameters: dict[str, Any], code: int, named: list[str]) -> None:
    told = following.next_command({"file": "x.yaml", **parameters}, code)
    assert told.startswith("Next: ")
    assert told.count("pd-deploy ") == len(named)
    assert [command for command in named if command not in told] == []


@pytest.mark.parametrize("own", ["Interrupted; the service is back on 1-85e1953c", ""])
def test_what_a_cancelled_run_says_itself_is_its_last_word(own: str) -> None:
    """Prefect's worker writes another one over it."""
    began = datetime.now(UTC)
    states = [Running(), Cancelling(), *([Cancelled(message=own)] if own else [])]
    last = Cancelled(message="Flow run was cancelled successfully.")
    for number, state in enumerate([*states, last]):
        state.timestamp = began + timedelta(seconds=number)

    async def read_flow_run_states(_: UUID) -> list[State[Any]]:
        return [last, *states]

    client: Any = SimpleNamespace(read_flow_run_states=read_flow_run_states)
    said = asyncio.run(following.in_its_own_words(client, RUN, last))
    assert said.message == (own or last.message)
    assert asyncio.run(following.in_its_own_words(client, RUN, Completed())).is_completed()
