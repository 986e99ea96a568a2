"""`pd-deploy deploy` and its like: how a run in the command's own process ends."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from prefect import State
from prefect.states import Cancelled, Completed, exception_to_failed_state

from pd_deploy.cli import run
from pd_deploy.cli.prefect_api import ServerLost
from pd_deploy.errors import DiskFull, NothingServes, RollbackFailed, RolledBack
from pd_deploy.flows import outcomes
from pd_deploy.flows.interrupts import ending


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes of exits at once, which are not carried out."""
    codes = list[int]()
    monkeypatch.setattr(run, "served", contextlib.nullcontext)
    monkeypatch.setattr(run.os, "_exit", codes.append)
    return codes


def lost_after(state: Any, *signals: int) -> Callable[..., Any]:
    """A run that ended so when its server was gone."""

    async def flow(**_: object) -> None:
        end = ending.get()
        end.state = state
        end.signals += signals
        raise ServerLost("expected a Prefect server, found none")

    return flow


@pytest.mark.parametrize(
    ("state", "signals", "code", "told"),
    [
        (Completed(message="serves"), (), 0, "Completed: serves"),
        (Cancelled(message="is back"), (2,), 130, "Cancelled: is back"),
        (None, (), 1, "expected a Prefect server"),
        (None, (15,), 143, "expected a Prefect server"),
    ],
)
def test_a_lost_server_does_not_decide_how_a_run_ended(
    exits: list[int],
    capsys: pytest.CaptureFixture[str],
    state: Any,
    signals: tuple[int, ...],
    code: int,
    told: str,
) -> None:
    flow: Any = lost_after(state, *signals)
    run.here(flow, file="x.yaml")
    assert exits == [code]
    printed = capsys.readouterr()
    assert told in printed.out + printed.err


REPAIRS = "`pd-deploy recover x.yaml` repairs what the run left"


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize(
    ("name", "hint"), [("pd-deploy", REPAIRS), ("pd-teardown", "run it again")]
)
def test_a_run_that_was_cut_off_says_what_to_run(
    exits: list[int],
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
    name: str,
    hint: str,
) -> None:
    async def flow(**_: object) -> None:
        raise error

    flow.name = name  # type: ignore[attr-defined]
    given: Any = flow
    assert run.here(given, file="x.yaml") == 130
    assert f"interrupted → {hint}" in capsys.readouterr().err
    assert not exits


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (None, 0, "Completed: serves\nNext: pd-deploy status x.yaml"),
        (
            DiskFull("expected room, found none", host="a (10.0.0.1)"),
            1,
            "pd-deploy: host a (10.0.0.1): expected room, found none\n"
            "Next: pd-deploy status x.yaml",
        ),
        (RolledBack("back on 1-x"), 6, "pd-deploy: back on 1-x\n"),
        (NothingServes("was stopped"), 4, "pd-deploy: was stopped\n"),
        (RollbackFailed("nor does 1-x"), 4, "pd-deploy: nor does 1-x\n"),
    ],
)
def test_after_a_run_comes_the_next_command(
    exits: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    code: int,
    told: str,
) -> None:
    async def flow(**_: object) -> Any:
        if isinstance(error, RolledBack | NothingServes):
            return outcomes.failed(error)
        if error:
            return await exception_to_failed_state(error)
        return Completed(message="serves")

    async def result(_: State[Any], **__: object) -> Exception | None:
        return error  # what Prefect keeps of it

    monkeypatch.setattr(State, "aresult", result)
    flow.name = "pd-deploy"  # type: ignore[attr-defined]
    given: Any = flow
    assert run.here(given, file="x.yaml") == code
    printed = capsys.readouterr()
    assert told in (printed.err if code else printed.out)
    assert not exits
