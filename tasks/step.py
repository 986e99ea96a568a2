"""What all steps have in common."""

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger

from pd_deploy.errors import PdDeployError, is_transient
from pd_deploy.steps.report import Report
from pd_deploy.tasks import story

story.tell()

P = ParamSpec("P")
R = TypeVar("R")

RETRY_DELAYS_S = (1, 3, 8)


def step(
    run_name: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Task[P, Coroutine[Any, Any, R]]]:
    """Makes a task of a function: named after its subject, retried on transient faults, with its
    report timed and logged. A call is checked against the function's own parameters.

    Args:
        run_name: name of the run, with the function's parameters in braces.
    """

    def decorate(function: Callable[P, Coroutine[Any, Any, R]]) -> Task[P, Coroutine[Any, Any, R]]:
        @functools.wraps(function)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            begin = time.monotonic()
            try:
                result = await function(*args, **kwargs)
            except PdDeployError as error:
                error.step = error.step or run_name.format(**_bound(function, args, kwargs))
                raise
            return cast(R, _timed(result, time.monotonic() - begin))

        return task(
            task_run_name=run_name,
            retries=len(RETRY_DELAYS_S),
            retry_delay_seconds=list(RETRY_DELAYS_S),
            retry_condition_fn=_worth_a_retry,
            cache_policy=NO_CACHE,
            persist_result=False,
        )(run)

    return decorate


def _bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    return inspect.signature(function).bind(*args, **kwargs).arguments


def _worth_a_retry(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    error = state.data
    return isinstance(error, Exception) and is_transient(error)


def _timed(result: Any, seconds: float) -> Any:
    if not isinstance(result, Report):
        return result
    get_run_logger().info("%s (%.1f s)", result.detail, seconds)
    return dataclasses.replace(result, seconds=seconds)
