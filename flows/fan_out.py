"""Running steps at the same time, and what happens if some of them fail."""

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import TypeVar

from pd_deploy.errors import Abandoned, SeveralFaults, faults_of, headline
from pd_deploy.steps.barrier import Barrier

T = TypeVar("T")


async def fan_out(barrier: Barrier, steps: Iterable[Awaitable[T]]) -> list[T]:
    """Run steps at the same time; return their results in order.

    If one fails, those that wait for something give up. All of them have ended before this raises.

    Raises:
        Exception: the one fault, if there is only one.
        SeveralFaults: several.
    """
    steps = list(steps)
    try:
        work = [_guarded(barrier, step) for step in steps]
        results = await asyncio.gather(*work, return_exceptions=True)
    finally:
        for step in steps:
            if isinstance(step, Coroutine):
                step.close()  # also where it was cancelled before it began
    faults: list[Exception] = []
    for result in results:
        if isinstance(result, Exception):
            faults += faults_of(result)
        elif isinstance(result, BaseException):
            raise result
    causes = [fault for fault in faults if not isinstance(fault, Abandoned)] or faults[:1]
    causes = list({(type(cause), str(cause)): cause for cause in causes}.values())
    if len(causes) == 1:
        raise causes[0]
    if causes:
        raise SeveralFaults(causes)
    return [result for result in results if not isinstance(result, BaseException)]


async def _guarded(barrier: Barrier, step: Awaitable[T]) -> T:
    try:
        return await step
    except Exception as error:
        barrier.fail(headline(error))
        raise
