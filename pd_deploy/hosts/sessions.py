"""Sessions of a host: one connection for all where its SSH server allows it, else several."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import asyncssh

from pd_deploy.errors import NoShell, SessionRefused, TimedOut
from pd_deploy.hosts import shell
from pd_deploy.hosts.link import Link

T = TypeVar("T")
Process = asyncssh.SSHClientProcess[bytes]

# sshd's MaxSessions is 10 by default; one is for all files, two are left for whoever shares the
# connection with us.
MAX_SESSIONS = 7
BEGIN_TIMEOUT_S = 60.0
PRINTED = 500


class Sessions:
    """Starts sessions; opens further connections where the SSH server refuses further sessions.

    Args:
        new_link: makes a further connection.
        first: the connection to start with; whoever made it closes it.
        most: how many sessions there are at the same time; more wait for their turn.
    """

    def __init__(
        self, new_link: Callable[[], Link], first: Link | None = None, most: int | None = None
    ) -> None:
        self._new_link = new_link
        self._first = first
        self._links = [first] if first else []
        self._further: list[Link] = []
        self._slots = asyncio.Semaphore(most) if most else contextlib.nullcontext()
        self._limit = MAX_SESSIONS
        self._taken: Counter[Link] = Counter()
        self._open: Counter[Link] = Counter()
        self.noisy: bool | None = None
        """Whether the login shell prints something before a command; None if not known yet."""

    @contextlib.asynccontextmanager
    async def process(
        self, argv: Sequence[str], *, stdin: int = asyncssh.PIPE
    ) -> AsyncIterator[Process]:
        """Start a command; both output streams have only what it prints itself.

        Raises:
            NoShell: the login shell did not run it.
            TimedOut: the login shell takes too long.
        """
        command = shell.line(argv)
        async with self.session(
            lambda connection: connection.create_process(command, encoding=None, stdin=stdin)
        ) as (link, process):
            try:
                self.noisy = await begin(link, process)
                yield process
            finally:
                process.close()

    @contextlib.asynccontextmanager
    async def session(
        self, start: Callable[[asyncssh.SSHClientConnection], Awaitable[T]]
    ) -> AsyncIterator[tuple[Link, T]]:
        """Start a session; yield its connection, too."""
        # Before it queues for a slot, so that all who queue learn at once of an unreachable host.
        if self._first:
            await self._first.connect()
        async with self._slots:
            link, started = await self._start(start)
            try:
                yield link, started
            finally:
                self._taken[link] -= 1
                self._open[link] -= 1

    async def aclose(self) -> None:
        """Close the further connections."""
        for link in self._further:
            await link.aclose()

    async def _start(
        self, start: Callable[[asyncssh.SSHClientConnection], Awaitable[T]]
    ) -> tuple[Link, T]:
        while True:
            # The place is taken before anything is awaited: a short call that queued behind lasting
            # ones, all meant for the same last place, would never come to its turn.
            link, is_new = self._room()
            self._taken[link] += 1
            try:
                started = await link.open_session(start)
            except BaseException as exc:
                self._taken[link] -= 1
                if not isinstance(exc, SessionRefused):
                    raise
                self._learn(link, is_new, exc)
                continue
            self._open[link] += 1
            return link, started

    def _room(self) -> tuple[Link, bool]:
        """Return a connection with room for a session more, and whether it is new."""
        link = next((link for link in self._links if self._taken[link] < self._limit), None)
        if link:
            return link, False
        link = self._new_link()
        self._links.append(link)
        self._further.append(link)
        return link, True

    def _learn(self, link: Link, is_new: bool, refused: SessionRefused) -> None:
        """Open as many sessions on a connection as its server allowed, from now on."""
        if self._open[link]:
            self._limit = min(self._limit, self._open[link])
        elif is_new:
            raise refused
        elif link in self._links:
            # Something else has all of its sessions.
            self._links.remove(link)


async def begin(link: Link, process: Process) -> bool:
    """Wait until a process prints its own output; return whether something came before.

    Raises:
        NoShell: it ended without.
        TimedOut: it takes too long.
        ConnectionDropped: the connection was lost.
    """
    printed = b""
    try:
        async with asyncio.timeout(BEGIN_TIMEOUT_S):
            try:
                for stream in (process.stdout, process.stderr):
                    printed += (await stream.readuntil(shell.MARK)).removesuffix(shell.MARK)
                return bool(printed)
            except asyncio.IncompleteReadError as exc:
                printed += exc.partial + await process.stderr.read()
                await process.wait_closed()
    except TimeoutError:
        raise TimedOut(
            f"its login shell ran no command within {BEGIN_TIMEOUT_S:g} s",
            host=link.where,
            hint="check what ~/.bashrc and the like wait for",
        ) from None
    except (asyncssh.Error, OSError) as exc:
        raise link.dropped(f"the connection was lost ({exc})") from None
    if process.returncode is None:
        raise link.dropped("the connection was lost as a command started")
    output = printed.decode(errors="replace").strip()[-PRINTED:]
    raise NoShell(
        f"its login shell ran no command: it ended with {process.returncode}, having printed "
        f"{output!r}",
        host=link.where,
        hint=f"`{link.command} echo ok` must print ok: in ~/.bashrc and the like, `exit` only "
        "from interactive shells; a user with nologin needs a shell, and a ForceCommand in "
        "sshd_config must run what it is given",
    )
