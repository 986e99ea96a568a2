"""Where the steps of one run wait for each other."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from pd_deploy.errors import Abandoned

T = TypeVar("T")


class Barrier:
    """Gates by name that open once, and one failure that ends every wait at once."""

    def __init__(self) -> None:
        self._open: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._shown: dict[str, Any] = {}
        self._failed = asyncio.Event()
        self._cause = ""

    def open(self, gate: str, shown: Any) -> None:
        """Let those through who wait for a gate; show them what opened it."""
        self._shown[gate] = shown
        self._open[gate].set()

    def fail(self, cause: str) -> None:
        """End every wait, present and future, with Abandoned naming the first cause."""
        if not self._failed.is_set():
            self._cause = cause
            self._failed.set()

    async def passed(self, gates: Iterable[str]) -> list[Any]:
        """Wait until all gates are open; return what opened them.

        Raises:
            Abandoned: another step failed.
        """
        gates = list(gates)
        for gate in gates:
            await self.unless_failed(self._open[gate].wait())
        return [self._shown[gate] for gate in gates]

    async def unless_failed(self, work: Coroutine[Any, Any, T], grace: float = 0) -> T:
        """Wait for the result of some work; give up as soon as another step fails.

        Args:
            grace: seconds for which the work goes on all the same; `math.inf` for its end.

        Raises:
            Abandoned: another step failed first.
        """
        if grace == math.inf:
            return await work
        if self._failed.is_set() and not grace:
            work.close()
            raise Abandoned(f"given up because {self._cause}")
        task = asyncio.ensure_future(work)
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait({task, failed}, return_when=asyncio.FIRST_COMPLETED)
            if grace and not task.done():
                await asyncio.wait({task}, timeout=grace)
            if task.done():
                return task.result()
            raise Abandoned(f"given up because {self._cause}")
        finally:
            for pending in (task, failed):
                pending.cancel()
            await asyncio.gather(task, failed, return_exceptions=True)
