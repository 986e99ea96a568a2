"""The SFTP server of a machine in memory, as `pd_deploy.hosts.files.Files` asks it."""

import asyncio
import posixpath
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import asyncssh

from tests.memory.disk import Entry
from tests.memory.machine import Machine

if TYPE_CHECKING:
    from tests.memory.host import MemoryHost


class MemorySftp:
    """An SFTP session. Errors are those that OpenSSH's server answers: of a disk that is full or
    read-only it says nothing but "Failure"."""

    def __init__(self, host: "MemoryHost") -> None:
        self._host = host
        self._machine = host.machine
        self._disk = host.machine.disk
        # As asyncssh's: when it is cancelled nobody gets an answer any more.
        self._reader = asyncio.ensure_future(asyncio.Event().wait())

    def exit(self) -> None:
        """Ends the session."""
        self._reader.cancel()

    async def answered(self) -> None:
        """Waits for an answer."""
        await asyncio.sleep(0)
        if self._reader.done():
            await asyncio.Event().wait()

    @asynccontextmanager
    async def _passing(self, what: str, *, changes: bool) -> AsyncIterator[None]:
        async with self._host.passing(what, changes=changes, way="sftp"):
            with _answering():
                if changes:
                    self._disk.may_change(what.partition(" ")[2])
                yield
            await self.answered()

    @asynccontextmanager
    async def open(
        self, path: str, mode: str, attrs: asyncssh.SFTPAttrs | None = None
    ) -> AsyncIterator["_OpenFile"]:
        """A file that is there (`rb`) or must not be (`xb`)."""
        changes = mode == "xb"
        what = f"{'draft' if changes else 'read'} {path}"
        async with self._passing(what, changes=changes):
            if changes:
                self._create(path, (attrs and attrs.permissions) or 0o644)
            found = self._need(path)
            if found.is_directory:
                raise asyncssh.SFTPFailure("Failure")
        try:
            yield _OpenFile(path, found, self._machine, self)
        finally:
            await self.answered()

    async def listdir(self, path: str) -> list[str]:
        """Names in a directory."""
        async with self._passing(f"list {path}", changes=False):
            self._need(path)
            return [".", "..", *self._disk.names(path)]

    async def stat(self, path: str) -> asyncssh.SFTPAttrs:
        """Kind, mode and size."""
        await self._host.reached(f"stat {path}")
        found = self._need(path)
        kind = stat.S_IFDIR if found.is_directory else stat.S_IFREG
        return asyncssh.SFTPAttrs(permissions=kind | found.mode, size=len(found.content or b""))

    lstat = stat

    async def realpath(self, path: str) -> str:
        """The path itself: there are no links."""
        await self._host.reached(f"realpath {path}")
        self._need(path)
        return posixpath.normpath(path)

    async def isdir(self, path: str) -> bool:
        """Whether there is such a directory."""
        await self._host.reached(f"stat {path}")
        found = self._disk.get(path)
        return found is not None and found.is_directory

    async def mkdir(self, path: str) -> None:
        """Makes a directory in one that is there."""
        async with self._passing(f"mkdir {path}", changes=True):
            self._need(posixpath.dirname(path))
            if self._disk.get(path):
                raise asyncssh.SFTPFailure("Failure")
            self._disk.make_room(path, 1)
            self._disk.entries[path] = Entry(None, 0o755)

    async def chmod(self, path: str, mode: int) -> None:
        """Sets a mode."""
        await self._host.reached(f"chmod {path}")
        self._need(path).mode = mode

    async def posix_rename(self, old: str, new: str) -> None:
        """Replaces what is at `new`."""
        async with self._passing(f"write {new}", changes=True):
            entry = self._need(old)
            del self._disk.entries[old]
            self._disk.entries[new] = entry

    async def unlink(self, path: str) -> None:
        """Removes a file."""
        async with self._passing(f"unlink {path}", changes=True):
            self._need(path)
            self._disk.remove(path)

    async def rmtree(self, path: str) -> None:
        """Removes a directory with all in it."""
        async with self._passing(f"rmtree {path}", changes=True):
            self._need(path)
            self._disk.remove(path)

    def _create(self, path: str, mode: int) -> None:
        self._need(posixpath.dirname(path))
        if self._disk.get(path):
            raise asyncssh.SFTPFailure("Failure")
        self._disk.entries[path] = Entry(b"", mode, self._machine.clock.seconds())

    def _need(self, path: str) -> Entry:
        found = self._disk.get(path)
        if found is None:
            raise asyncssh.SFTPNoSuchFile("No such file")
        return found


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise asyncssh.SFTPFailure("Failure") from error


class _OpenFile:
    def __init__(self, path: str, entry: Entry, machine: Machine, session: MemorySftp) -> None:
        self._path = path
        self._entry = entry
        self._machine = machine
        self._session = session

    async def read(self, size: int = -1, offset: int | None = None) -> bytes:
        await self._session.answered()
        rest = (self._entry.content or b"")[offset or 0 :]
        return rest if size < 0 else rest[:size]

    async def write(self, content: bytes) -> None:
        with _answering():
            self._machine.disk.make_room(self._path, len(content))
        self._entry.content = content
        self._entry.changed = self._machine.clock.seconds()
        await self._session.answered()

    async def chmod(self, mode: int) -> None:
        self._entry.mode = mode

    async def fsync(self) -> None:
        pass
