"""Asking hosts of which any may be away, or hang, for those who only look: one that does not answer
costs the others nothing but this time, and is told beside them.

A host hangs when its SSH server lets one in and its Docker engine, or its disk, gives no answer.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pd_deploy.errors import PdDeployError, TimedOut
from pd_deploy.hosts.host import Host

T = TypeVar("T")

ANSWER_S = 20.0
"""What a host has for saying what is on it, once it is connected. Runs are more patient: an engine
that removes large containers is slow."""


async def promptly(host: Host, question: Coroutine[Any, Any, T]) -> T:
    """Ask a host what is on it, for as long as one may be waited for.

    Raises:
        TimedOut: it did not answer, though it may be there.
    """
    limit = host.connect_timeout + ANSWER_S
    try:
        async with asyncio.timeout(limit):
            return await question
    except TimeoutError:
        raise TimedOut(
            f"it did not say within {limit:g} s what is on it: its Docker engine or its disk may "
            "hang",
            host=host.where,
            hint="look at `systemctl status docker` and at the kernel's log there",
        ) from None


async def answer_of(host: Host, question: Coroutine[Any, Any, T]) -> T | PdDeployError:
    """Ask a host as `promptly` does; return why it does not answer, if it does not."""
    return await or_error(promptly(host, question))


async def or_error(question: Coroutine[Any, Any, T]) -> T | PdDeployError:
    """Return an answer, or why there is none."""
    try:
        return await question
    except PdDeployError as error:
        return error
