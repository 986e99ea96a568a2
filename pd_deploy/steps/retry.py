"""Trying again what may work the next time: the one rule of steps and of what runs between them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pd_deploy.errors import is_transient

T = TypeVar("T")

RETRY_DELAYS_S = (1, 3, 8)


async def retried(call: Callable[[], Awaitable[T]]) -> T:
    """Return a call's result; call again after each delay while its fault is a transient one."""
    for delay in RETRY_DELAYS_S:
        try:
            return await call()
        except Exception as fault:
            if not is_transient(fault):
                raise
        await asyncio.sleep(delay)
    return await call()
