"""Streams to a host's Docker socket: forwarded by sshd, or through `docker system dial-stdio`."""

import contextlib
import logging
import shlex
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

from pd_deploy.errors import (
    DockerAccessDenied,
    DockerDown,
    DockerMissing,
    PdDeployError,
    SessionRefused,
)
from pd_deploy.hosts.link import MAX_SESSIONS, Link
from pd_deploy.hosts.tunnel import Stream

log = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 1.0  # the status follows the output at once, if the connection is up

# sshd answers "open failed" alike when forwarding is off, the socket is missing, access is denied
# and nobody listens; so the host is asked which one it is.
DIAGNOSE = r"""sock=$1
if ! command -v docker >/dev/null; then
  if [ ! -e "$sock" ]; then echo missing
  elif [ ! -w "$sock" ]; then echo denied
  else echo down; fi
elif [ -e "$sock" ] && [ ! -w "$sock" ]; then echo denied
elif timeout 20 docker -H "unix://$sock" version --format ok >/dev/null 2>&1; then echo up
else echo down; fi"""


class DockerSocket:
    """Opens streams to the Docker socket of one host.

    Args:
        link: the host's connection.
        spare_link: makes further connections, for `dial-stdio` beyond one connection's sessions.
        path: the Docker socket on the host.
        where: the host's name for messages.
        user: the SSH user, for messages.
    """

    def __init__(
        self, link: Link, spare_link: Callable[[], Link], path: str, where: str, user: str
    ) -> None:
        self._link = link
        self._spare_link = spare_link
        self._spares: list[Link] = []
        self._streams: Counter[Link] = Counter()
        self._path = path
        self._where = where
        self._user = user
        self.stdio = False
        """Whether streams go through `dial-stdio`, since the server forwards none."""

    @contextlib.asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        """Open a stream to the Docker engine.

        Raises:
            DockerAccessDenied, DockerMissing, DockerDown: the engine can't be had.
        """
        if not self.stdio:
            with contextlib.suppress(_ForwardingOff):
                async with self._forwarded() as stream:
                    yield stream
                return
            log.info("host %s forwards no UNIX sockets, using dial-stdio", self._where)
            self.stdio = True
        async with self._dialled() as stream:
            yield stream

    async def aclose(self) -> None:
        """Close the connections that were opened for `dial-stdio`."""
        for link in self._spares:
            await link.aclose()

    @contextlib.asynccontextmanager
    async def _forwarded(self) -> AsyncIterator[Stream]:
        try:
            reader, writer = await self._link.open(
                lambda connection: connection.open_unix_connection(self._path)
            )
        except SessionRefused:
            await self._diagnose()
            raise _ForwardingOff from None
        try:
            yield reader, writer
        finally:
            writer.channel.abort()

    @contextlib.asynccontextmanager
    async def _dialled(self) -> AsyncIterator[Stream]:
        command = shlex.join(["docker", "-H", f"unix://{self._path}", "system", "dial-stdio"])
        with self._room() as link:
            async with link.session(
                lambda connection: connection.create_process(command, encoding=None)
            ) as process:
                try:
                    yield process.stdout, process.stdin
                    # Its status comes after the end of its output.
                    with contextlib.suppress(TimeoutError):
                        await process.wait(timeout=EXIT_TIMEOUT_S)
                finally:
                    process.close()
                if process.exit_status:
                    await self._diagnose()

    @contextlib.contextmanager
    def _room(self) -> Iterator[Link]:
        """Reserve room for one more stream on a link.

        Streams have their own links, because they may last and would block the host's commands. The
        room is taken before anything is awaited: otherwise a short call could queue behind lasting
        ones for the same last slot, and never get its turn.
        """
        link = next((one for one in self._spares if self._streams[one] < MAX_SESSIONS), None)
        if link is None:
            link = self._spare_link()
            self._spares.append(link)
        self._streams[link] += 1
        try:
            yield link
        finally:
            self._streams[link] -= 1

    async def _diagnose(self) -> None:
        """Raise what is wrong with the engine; return if it answers on the host itself."""
        command = shlex.join(["sh", "-c", DIAGNOSE, "sh", self._path])
        async with self._link.session(lambda connection: connection.run(command)) as result:
            verdict = str(result.stdout or "").strip()
        if verdict != "up":
            raise self._error(verdict)

    def _error(self, verdict: str) -> PdDeployError:
        if verdict == "denied":
            return DockerAccessDenied(
                f"user {self._user} may not use the Docker socket {self._path}",
                host=self._where,
                hint=f"as root: usermod -aG docker {self._user} (it counts from the next login)",
            )
        if verdict == "missing":
            return DockerMissing(
                f"neither a docker command nor the Docker socket {self._path} exists",
                host=self._where,
                hint="install Docker Engine 20.10 or newer",
            )
        return DockerDown(
            f"no Docker engine answers at {self._path}",
            host=self._where,
            hint="look at `systemctl status docker` and start it",
        )


class _ForwardingOff(Exception):
    """The SSH server forwards no UNIX sockets, though the engine is up."""
