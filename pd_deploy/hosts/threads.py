"""Blocking calls on threads of their own."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[[], T], name: str) -> T:
    """Run a blocking call on its own daemon thread.

    asyncio's and concurrent.futures' pools join their threads when the process exits, so one call
    that hangs would keep it alive; and a blocked pool would starve the loop that has to forward
    the call's socket.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def body() -> None:
        try:
            result = call()
        except BaseException as exc:
            _tell(loop, future.set_exception, future, exc)
        else:
            _tell(loop, future.set_result, future, result)

    threading.Thread(target=body, name=name, daemon=True).start()
    return await future


def _tell(
    loop: asyncio.AbstractEventLoop,
    settle: Callable[[Any], None],
    future: asyncio.Future[T],
    value: Any,
) -> None:
    def unless_cancelled() -> None:
        if not future.done():
            settle(value)

    if not loop.is_closed():
        loop.call_soon_threadsafe(unless_cancelled)
