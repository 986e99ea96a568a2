"""An SFTP session that calls share, and the end of calls whose answers never come."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

import asyncssh
from asyncssh.sftp import start_sftp_client

from pd_deploy.errors import ConnectionDropped, NoSftp, TimedOut
from pd_deploy.hosts import shell
from pd_deploy.hosts.link import Link
from pd_deploy.hosts.sessions import begin
from pd_deploy.hosts.settled import retrieve

T = TypeVar("T")

CALL_TIMEOUT_S = 120.0  # for many small files on a slow disk, not for large ones
CLEAN_UP_S = 5.0  # to remove one draft of a file
MOST_WAITS = 100  # far more than a clean-up has; only bounds the loop
# Where Debian, Red Hat and openEuler, SUSE, and others have it.
SERVER = """for dir in /usr/lib/openssh /usr/libexec/openssh /usr/lib/ssh /usr/libexec /usr/lib; do
  [ -x "$dir/sftp-server" ] && exec "$dir/sftp-server"
done; exit 127"""


class SftpSession:
    """One SFTP session; each has a process on the host.

    Args:
        client: the session.
        where: the host's name for messages.
    """

    def __init__(self, client: asyncssh.SFTPClient, where: str) -> None:
        self.client = client
        self._where = where
        self._calls = 0
        self._dropped = False
        # A task of asyncssh's reads the answers. When everything on the event loop is cancelled it
        # ends, and leaves those who wait for an answer waiting; this task then ends with it.
        self._watch = asyncio.ensure_future(asyncio.Event().wait())

    @property
    def usable(self) -> bool:
        """Whether another call may use it."""
        return not self._dropped and not self._watch.done() and not self._watch.cancelling()

    async def result(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call that uses the session.

        A call that is cancelled gets `CLEAN_UP_S` to clean up, and none of it if nobody reads its
        answers any longer.

        Raises:
            TimedOut: it took longer than `CALL_TIMEOUT_S`.
            ConnectionDropped: the session ended.
        """
        work = asyncio.ensure_future(call)
        work.add_done_callback(retrieve)
        self._calls += 1
        try:
            await self._wait_for(work, CALL_TIMEOUT_S)
            if work.done():
                return work.result()
        except ConnectionDropped:
            # The SFTP server may have ended alone, while the connection is still up.
            self.drop()
            raise
        finally:
            await self._end(work)
            self._calls -= 1
            self._close_if_unused()
        if self._watch.done():
            raise ConnectionDropped("the SFTP session was cancelled", host=self._where)
        raise TimedOut(
            f"its SFTP server did not answer within {CALL_TIMEOUT_S:g} s",
            host=self._where,
            hint="check the host's load and its disks",
        )

    def drop(self) -> None:
        """Let no further call use it, and close it after the last one."""
        self._dropped = True
        self._close_if_unused()

    async def _end(self, work: "asyncio.Task[Any]") -> None:
        if work.done():
            return
        # Its answer may never come, and those of later calls come after it.
        self.drop()
        work.cancel()
        try:
            await self._wait_for(work, CLEAN_UP_S)
        finally:
            # Once more for each answer that its clean-up would wait for.
            for _ in range(MOST_WAITS):
                if work.done():
                    break
                work.cancel()
                await asyncio.sleep(0)

    async def _wait_for(self, work: "asyncio.Task[Any]", seconds: float) -> None:
        await asyncio.wait(
            {work, self._watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )

    def _close_if_unused(self) -> None:
        if self._calls == 0 and not self.usable:
            self._watch.cancel()
            with contextlib.suppress(OSError, asyncssh.Error):
                self.client.exit()


async def by_command(connection: asyncssh.SSHClientConnection, link: Link) -> asyncssh.SFTPClient:
    """Start the SFTP server as a command.

    Raises:
        NoSftp: the host has none.
    """
    process = await connection.create_process(shell.line(["sh", "-c", SERVER]), encoding=None)
    try:
        await begin(link, process)
        return await start_sftp_client(
            connection,
            asyncio.get_running_loop(),
            "strict",
            process.stdout,
            process.stdin,
            "utf-8",
            "strict",
            3,
        )
    except (asyncssh.SFTPEOFError, asyncssh.SFTPConnectionLost):
        process.close()
        await process.wait_closed()
        if process.returncode is None:
            raise
        raise NoSftp(
            "the SSH server offers no SFTP, and there is no sftp-server program to run",
            host=link.where,
            hint="add `Subsystem sftp internal-sftp` to its sshd_config and reload sshd, or "
            "install the package with sftp-server",
        ) from None
    except BaseException:
        process.close()
        raise
