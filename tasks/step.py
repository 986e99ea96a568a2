"""What all steps have in common: a name, retries, a log line, and what they wait for."""

import asyncio
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, ParamSpec, TypeVar, cast

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.tasks import TaskRunNameCallbackWithParameters
from prefect.utilities.annotations import opaque, quote

from pd_deploy.code.reading import Source
from pd_deploy.errors import Abandoned, PdDeployError, headline, is_transient
from pd_deploy.records.releases import Choice
from pd_deploy.steps.full_preflight import Inspected
from pd_deploy.steps.host_records import HostRecords
from pd_deploy.steps.identifying import Identified
from pd_deploy.steps.report import Gate, Report
from pd_deploy.steps.retry import RETRY_DELAYS_S
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import Addresses, ResolvedImage
from pd_deploy.steps.timeline import Took
from pd_deploy.steps.verify.smoke import Completion
from pd_deploy.tasks import story

story.tell()

P = ParamSpec("P")
R = TypeVar("R")

TO_ITS_END = math.inf

Result = (
    Report
    | Gate
    | HostRecords
    | HostState
    | Choice
    | ResolvedImage
    | Identified
    | Source
    | Addresses
    | Rollout
    | Completion
    | Inspected
)
"""What a step may wait for: the result of another."""


class Step(Generic[P, R]):
    """A function as a step of a run, to be called with the function's own parameters.

    In a flow run it is a task of Prefect; outside, as for `pd-deploy plan`, the function alone.

    Attributes:
        name: of its task runs, with the function's parameters in braces.
    """

    def __init__(self, task_: Task[P, Coroutine[Any, Any, R]], name: str) -> None:
        self.task = task_
        self.name = name

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step."""
        return await self._run((), args, kwargs)

    def after(self, *results: Result) -> Callable[P, Coroutine[Any, Any, R]]:
        """Return the step as one that follows those with these results in the run's graph."""

        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return await self._run(results, args, kwargs)

        return run

    async def _run(
        self, results: tuple[Result, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> R:
        if FlowRunContext.get() is None:
            return await self.task.fn(*args, **kwargs)
        # Prefect searches all arguments of a task for other tasks' results. `quote` keeps it out of
        # a run's state, which is large; `wait_for` names the results.
        run = cast(Callable[..., Coroutine[Any, Any, R]], self.task)
        return await run(
            *map(quote, args),
            **{name: quote(value) for name, value in kwargs.items()},
            wait_for=[opaque(result) for result in results],
        )


def step(
    run_name: str, *, grace: float = 0
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Step[P, R]]:
    """Make a step of a function: name it after its subject, retry it on transient faults, time it,
    and log its result. It gives up when another step of the run has failed.

    Args:
        run_name: name of the task run, with the function's parameters in braces.
        grace: seconds for which it goes on when another has failed: looks at hosts, so that faults
            of several are told together; `TO_ITS_END` for what must not be cut, such as a stop.
    """

    def decorate(function: Callable[P, Coroutine[Any, Any, R]]) -> Step[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            session = _session(args)
            clock = _Clock(run_name, signature.bind(*args, **kwargs).arguments)
            phase = session.timeline.phase if session else ""
            try:
                work = function(*args, **kwargs)
                result = await (session.barrier.unless_failed(work, grace) if session else work)
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, PdDeployError):
                    error.step = error.step or clock.name
                    if FlowRunContext.get():
                        story.log_fault(error)
                if session:
                    session.timeline.steps.append(clock.failed(phase, error))
                raise
            if isinstance(result, Report):
                result = cast(R, dataclasses.replace(result, seconds=clock.seconds))
            if session:
                session.timeline.steps.append(clock.ended(phase, result))
            if FlowRunContext.get():
                story.log(result)
            return result

        def task_run_name(parameters: dict[str, Any]) -> str:
            session = _session(parameters.values())
            prefix = session.timeline.prefix if session else ""
            return f"{prefix}{run_name.format(**parameters)}"

        return Step(
            task(
                task_run_name=cast(TaskRunNameCallbackWithParameters, task_run_name),
                retries=len(RETRY_DELAYS_S),
                retry_delay_seconds=list(RETRY_DELAYS_S),
                retry_condition_fn=_worth_a_retry,
                cache_policy=NO_CACHE,
                persist_result=False,
            )(run),
            run_name,
        )

    return decorate


def pure(function: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Turn a function that waits for nothing into one that can be a step."""

    @functools.wraps(function)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    return run


class _Clock:
    """Tells how long a step took, and what became of it."""

    def __init__(self, run_name: str, parameters: dict[str, Any]) -> None:
        self.name = run_name.format(**parameters)
        self._verb = run_name.partition("{")[0].strip()
        self._began, self._begin = time.monotonic(), datetime.now(UTC)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def ended(self, phase: str, result: object) -> Took:
        took = self._took(phase)
        if not isinstance(result, Report):
            return dataclasses.replace(took, detail=getattr(result, "detail", ""))
        return dataclasses.replace(took, detail=result.detail, changed=result.changed)

    def failed(self, phase: str, error: BaseException) -> Took:
        given_up = isinstance(error, Abandoned | asyncio.CancelledError)
        detail = "given up" if given_up else headline(error)
        return dataclasses.replace(self._took(phase), detail=detail, failed=True)

    def _took(self, phase: str) -> Took:
        subject = self.name.removeprefix(self._verb).strip()
        end = self._begin + timedelta(seconds=self.seconds)
        return Took(self._verb, subject, phase, self._begin, end)


def _session(args: Iterable[object]) -> Session | None:
    """Return the session of the run that a step belongs to: of its first parameter."""
    of = next(iter(args), None)
    session = of.session if isinstance(of, Rollout) else of
    return session if isinstance(session, Session) else None


def _worth_a_retry(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    error = state.data
    return isinstance(error, Exception) and is_transient(error)
