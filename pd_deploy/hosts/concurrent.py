"""Calls at the same time, and what becomes of the others when one fails."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Give a task group whose first error stops the other tasks and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls at the same time; the first error stops the others and is raised as it is."""
    async with task_group() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


async def all_ended(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls at the same time that are not to be cut, such as stops: when one fails, the others
    still come to their end; then its error is raised."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
