"""What runs do to their hosts, one moment after the other, and the faults that come in there."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from pd_deploy.errors import TimedOut

Way = Literal["session", "sftp", "docker", "http"]
HANG_S = 60
"""After which the SSH connection gives up a call, or the Docker engine's client."""


class Killed(BaseException):
    """The run's process is gone: nothing it asks for is done any more."""


@dataclass(frozen=True)
class Moment:
    """Just before a call takes effect on a host, or just after it; numbers count from 1.

    Attributes:
        way: what the call goes through: a session with a command, the SFTP session, the Docker
            engine's API, or a connection to a port.
    """

    number: int
    host: str
    what: str
    changes: bool
    after: bool
    way: Way

    def __str__(self) -> str:
        return f"{self.number}: {'after' if self.after else 'before'} {self.what} on {self.host}"


class Calls:
    """The calls of one run.

    Attributes:
        moments: those that have passed.
        watch: told of each; what it raises, the call raises.
        dead: whether the run was killed.
        hangs: whether the call at a moment is not answered, until it is given up.
    """

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.watch: Callable[[Moment], None] = lambda _: None
        self.dead = False
        self.hangs: Callable[[Moment], bool] = lambda _: False

    @asynccontextmanager
    async def passing(
        self, host: str, what: str, *, changes: bool, way: Way
    ) -> AsyncIterator[None]:
        """Around what a call does: the moments before and after it."""
        await self._pass(host, what, changes, way, after=False)
        # Others come in between, as on a real connection.
        await asyncio.sleep(0)
        if self.dead:
            raise Killed
        yield
        await self._pass(host, what, changes, way, after=True)

    async def _pass(self, host: str, what: str, changes: bool, way: Way, *, after: bool) -> None:
        if self.dead:
            raise Killed
        self.moments.append(Moment(len(self.moments) + 1, host, what, changes, after, way))
        self.watch(self.moments[-1])
        if self.hangs(self.moments[-1]):
            await hang(host)


async def hang(host: str) -> None:
    """Wait for an answer that never comes, until it is given up."""
    await asyncio.sleep(HANG_S)
    raise TimedOut(f"no answer within {HANG_S} s", host=host)
