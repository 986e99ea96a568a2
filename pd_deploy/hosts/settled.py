"""Calls whose effect has to be known, whatever becomes of their caller."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

SETTLE_S = 10.0  # most calls take less than a second; a cancelled run must end in reasonable time


async def settled(call: Coroutine[Any, Any, T]) -> T:
    """Return the result of a call that changes a host.

    The request is out when the caller is cancelled, and the host carries it out all the same. So a
    cancelled caller waits up to `SETTLE_S` for the call's end: whoever looks at the host afterwards
    sees what is so.
    """
    work = asyncio.ensure_future(call)
    work.add_done_callback(retrieve)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        try:
            await asyncio.wait({work}, timeout=SETTLE_S)
        finally:
            work.cancel()
        raise


async def carried_out(end: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Carry out what ends a piece of work, though it be cancelled once.

    Whoever cancels it then asks for the end that this is. Where the call itself was cancelled, it
    is made once more.

    Args:
        end: may be called twice.
    """
    try:
        await settled(end())
    except asyncio.CancelledError:
        await end()


def retrieve(work: "asyncio.Task[Any]") -> None:
    """Look at an outcome, for which nobody may wait any more."""
    if not work.cancelled():
        work.exception()
