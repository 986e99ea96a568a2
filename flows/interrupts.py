"""Requests to end a run: Ctrl-C, Prefect's cancel, `kill`. Each cancels the flow's task.

The first one ends what the run does; what it has to undo it undoes then. Another one ends that.
That nobody reads its output any more, as its worker has died, is no request.
"""

import asyncio
import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec

from prefect import State, runtime
from prefect.logging import get_run_logger
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.states import Cancelled

from pd_deploy.errors import PdDeployError
from pd_deploy.flows import outcomes, publish
from pd_deploy.flows.garbage import collect_seldom
from pd_deploy.flows.run import Page, page, remedy
from pd_deploy.hosts.lease import Lease

P = ParamSpec("P")
Runbook = Callable[P, Coroutine[Any, Any, State[None]]]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GOES_BACK = (
    "this run stops, and brings back what served before if it has stopped that; "
    "a second signal ends it at once (then run {remedy})"
)


@dataclass
class Ending:
    """How a run ends, for the command that runs it.

    Attributes:
        signals: that came while it ran.
        state: its last state, which its server may not know.
    """

    signals: list[int] = field(default_factory=list)
    state: State[None] | None = None


ending: ContextVar[Ending] = ContextVar("ending")
"""Of the run in this context, where somebody wants to know."""


def interruptible(
    left: str, first: str = "", *, reports: bool = True
) -> Callable[[Runbook[P]], Runbook[P]]:
    """Have a flow's function end by itself when it is asked to end, as Cancelled, and under a name
    that tells what became of the service when it fails; and with a report, however it ends.

    Args:
        left: what became of the hosts when it ended in a part that undoes nothing.
        first: what the first request does, `GOES_BACK` or else; by default, it ends the run there.
        reports: whether it has a report.
    """

    def decorate(runbook: Runbook[P]) -> Runbook[P]:
        @functools.wraps(runbook)
        async def run(*args: P.args, **kwargs: P.kwargs) -> State[None]:
            end = ending.get(Ending())
            page.set(Page(Path(runtime.flow_run.parameters.get("file", "")).stem))
            outlive_reader()
            collect_seldom()
            with _signals_cancel_this_task(end.signals, *_told(left, first)):
                try:
                    end.state = await runbook(*args, **kwargs)
                except asyncio.CancelledError:
                    end.state = Cancelled(message=f"Interrupted; {left}")
                except Exception as error:
                    if reports:
                        await _report(error, left)
                    if not isinstance(error, PdDeployError):
                        raise
                    if outcomes.name_of(error) == outcomes.FAILED:
                        raise
                    if not error.logged:
                        get_run_logger().error("%s", error)
                    end.state = outcomes.failed(error)
                finally:
                    _uncancel()
                if reports:
                    await _report(end.state, left)
                return end.state

        return run

    return decorate


def _told(left: str, first: str) -> tuple[str, str]:
    """Write what the first request to end a run does, and what a further one does."""
    if first == GOES_BACK:
        return first.format(remedy=remedy()), f"this run ends at once; then run {remedy()}"
    return first or f"this run ends; {left}", f"this run ends at once; {left}"


async def _report(end: State[None] | Exception, left: str) -> None:
    """Publish a report of a run that has none; a further request to end ends that, too."""
    _uncancel()
    with contextlib.suppress(asyncio.CancelledError):
        await publish.otherwise(end, left)
    _uncancel()


def outlive_reader() -> None:
    """Lose log lines that can't be printed; the server has them as well.

    A worker reads what its runs print. Once it has died, the next line would end a run: Rich, which
    prints for Prefect, exits where a pipe is broken.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.on_broken_pipe = lambda: None  # type: ignore[method-assign]


def goes_on(lease: Lease, *, interrupted: bool) -> bool:
    """Tell whether a run that was cancelled may still undo what it did: after the first time.

    Its task is uncancelled, and leases are renewed again if that was cancelled as well.

    Args:
        interrupted: whether it was cancelled before.
    """
    task = asyncio.current_task()
    again = interrupted or (task is not None and task.cancelling() > 1)
    _uncancel()
    lease.renew_again()
    return not again


@contextmanager
def _signals_cancel_this_task(seen: list[int], first: str, again: str) -> Iterator[None]:
    """Have each signal cancel this task, and it alone, for as long as the body runs.

    Prefect's handler raises an exception wherever the process is just then: in the event loop it
    cancels every task there, in a callback it is lost. Prefect notices that its own is not there,
    and sends its signal all the same.

    Args:
        seen: gets the number of each.
        first, again: what the first one does, and what each further one does.
    """
    task, loop, logger = asyncio.current_task(), asyncio.get_running_loop(), get_run_logger()
    assert task is not None

    def interrupt(number: int) -> None:
        seen.append(number)
        name = signal.Signals(number).name
        if len(seen) == 1:
            logger.warning("%s: %s", name, first)
        else:
            logger.warning("%s again: %s", name, again)
        task.cancel()

    def handler(number: int, _: FrameType | None) -> None:
        loop.call_soon_threadsafe(interrupt, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced: dict[int, Any] = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in replaced.items():
            signal.signal(number, former)


def _uncancel() -> None:
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()
