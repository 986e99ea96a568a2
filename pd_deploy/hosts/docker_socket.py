"""Streams to a host's Docker socket: forwarded by sshd, or through `docker system dial-stdio`."""

import contextlib
import logging
from collections.abc import AsyncIterator

from pd_deploy.errors import (
    DockerAccessDenied,
    DockerDown,
    DockerMissing,
    PdDeployError,
    SessionRefused,
)
from pd_deploy.hosts.link import Link
from pd_deploy.hosts.sessions import Sessions
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
        commands: runs commands on the host.
        spares: sessions for `dial-stdio`, on connections of their own: streams may last, and would
            block the host's commands.
        path: the Docker socket on the host.
        where: the host's name for messages.
        user: the SSH user, for messages.
    """

    def __init__(
        self, link: Link, commands: Sessions, spares: Sessions, path: str, where: str, user: str
    ) -> None:
        self._link = link
        self._commands = commands
        self._spares = spares
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
        await self._spares.aclose()

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
        command = ["docker", "-H", f"unix://{self._path}", "system", "dial-stdio"]
        async with self._spares.process(command) as process:
            yield process.stdout, process.stdin
            # Its status comes after the end of its output.
            with contextlib.suppress(TimeoutError):
                await process.wait(timeout=EXIT_TIMEOUT_S)
            process.close()
            if process.exit_status:
                await self._diagnose()

    async def _diagnose(self) -> None:
        """Raise what is wrong with the engine; return if it answers on the host itself."""
        async with self._commands.process(["sh", "-c", DIAGNOSE, "sh", self._path]) as process:
            verdict = (await process.stdout.read()).decode(errors="replace").strip()
        if verdict != "up":
            raise self._error(verdict)

    def _error(self, verdict: str) -> PdDeployError:
        if verdict == "denied":
            return DockerAccessDenied(
                f"user {self._user} may not use the Docker socket {self._path}",
                host=self._where,
                hint=f"as root: usermod -aG docker {self._user} "
                "(it takes effect at the next login)",
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
            hint="look at `systemctl status docker` and start it; if its socket is elsewhere, say "
            "where in `docker_socket` of the host",
        )


class _ForwardingOff(Exception):
    """The SSH server forwards no UNIX sockets, though the engine is up."""
