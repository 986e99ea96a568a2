"""Asking a service over HTTP: an answer that is late is none, but says nothing yet."""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

T = TypeVar("T")

LOST_AFTER_S = 20.0
"""By then a host that went away is known as such: its connection was lost."""


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask again while no answer comes in time, so that a connection that stands still for a moment
    is not taken for a server that does.

    Raises:
        httpx.TimeoutException: no answer came for `LOST_AFTER_S`.
    """
    deadline = time.monotonic() + LOST_AFTER_S
    while True:
        try:
            return await ask()
        except httpx.TimeoutException:
            if time.monotonic() >= deadline:
                raise
