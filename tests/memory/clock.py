"""Time in memory: it passes only when everybody waits, and then at once."""

import asyncio
import selectors
import time
from datetime import UTC, datetime, timedelta
from typing import Any

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_STEP = timedelta(microseconds=1)


class Stuck(BaseException):
    """Everybody waits for something that never comes."""


class Clock:
    """The hosts' clock; a virtual one stands still until `pass_by`."""

    def __init__(self, *, real: bool = False) -> None:
        self._real = real
        self._now = 1000.0
        self._epoch = EPOCH
        self._last = EPOCH

    def seconds(self) -> float:
        """Now, in seconds."""
        return time.monotonic() if self._real else self._now

    def pass_by(self, seconds: float) -> None:
        """Lets time pass."""
        self._now += seconds

    def step(self, seconds: float) -> None:
        """Sets the date: what counts seconds goes on."""
        self._epoch += timedelta(seconds=seconds)
        self._last += timedelta(seconds=seconds)

    def date(self) -> datetime:
        """Now, as a date; each is later than the one before, so that events keep their order."""
        self._last = max(self._epoch + timedelta(seconds=self.seconds()), self._last + _STEP)
        return self._last


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop by a virtual clock: nobody waits really."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(_Selector(clock))
        self._clock = clock

    def time(self) -> float:
        """The clock's time."""
        return self._clock.seconds()


class _Selector(selectors.DefaultSelector):
    """Lets time pass in place of waiting."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("no task can go on, and none waits for a time to come")
        if timeout > 0:
            self._clock.pass_by(timeout)
        return []
