"""Files of a host, by SFTP."""

import asyncio
import contextlib
import posixpath
import secrets
import stat
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncssh

from pd_deploy.errors import (
    ConnectionDropped,
    DiskFull,
    FileDenied,
    FileMissing,
    HostError,
    NotOurs,
    PdDeployError,
)

T = TypeVar("T")

# sftp-server answers a full disk with its general failure, whose text is all there is.
NO_SPACE = "No space left"


@dataclass(frozen=True)
class File:
    """A file to be: its content and its permission bits."""

    content: bytes
    mode: int = 0o644


class Files:
    """Reads and writes over one SFTP session.

    Args:
        sftp: the session.
        where: the host's name for messages.
    """

    def __init__(self, sftp: asyncssh.SFTPClient, where: str) -> None:
        self._sftp = sftp
        self._where = where

    async def write(self, path: str, file: File) -> bool:
        """Write a file atomically unless it is as it should be; return whether it was written."""
        if await self._is(path, file):
            return False
        draft = posixpath.join(
            posixpath.dirname(path), f".{posixpath.basename(path)}.{secrets.token_hex(4)}.tmp"
        )
        with self._errors(path):
            try:
                await self._write_draft(draft, file)
                await self._sftp.posix_rename(draft, path)
            except BaseException:
                with contextlib.suppress(asyncssh.SFTPError):
                    await self._sftp.unlink(draft)
                raise
        return True

    async def read(self, path: str) -> bytes | None:
        """A file's content, None if there is none."""
        with self._errors(path):
            try:
                async with self._sftp.open(path, "rb") as file:
                    content: bytes = await file.read()
                    return content
            except asyncssh.SFTPNoSuchFile:
                return None

    async def make_dirs(self, paths: Iterable[str], mode: int) -> list[str]:
        """Creates directories with their parents; returns those that were not there, sorted."""
        created: list[str] = []
        for path in sorted(set(paths)):
            await self._make_dir(posixpath.normpath(path), mode, created)
        return sorted(created)

    async def remove_tree(self, path: str, below: str) -> bool:
        """Removes what `path` names, if it lies strictly below `below`."""
        path = self._inside(path, below)
        with self._errors(path):
            try:
                await self._check_parent(path, below)
                found = await self._sftp.lstat(path)
            except asyncssh.SFTPNoSuchFile:
                return False
            # lstat, so that a link goes and what it points to stays.
            if stat.S_ISDIR(found.permissions or 0):
                await self._sftp.rmtree(path)
            else:
                await self._sftp.unlink(path)
        return True

    def _inside(self, path: str, below: str) -> str:
        plain, root = posixpath.normpath(path), posixpath.normpath(below)
        absolute = path.startswith("/") and below.startswith("/")
        if absolute and root != "/" and ".." not in path.split("/") and _is_below(plain, root):
            return plain
        raise NotOurs(
            f"won't remove {path!r}: expected an absolute path below {below!r}", host=self._where
        )

    async def _check_parent(self, path: str, below: str) -> None:
        parent = str(await self._sftp.realpath(posixpath.dirname(path)))
        root = str(await self._sftp.realpath(below))
        if parent != root and not _is_below(parent, root):
            raise NotOurs(
                f"won't remove {path!r}: a link leads out of {below!r}, to {parent!r}",
                host=self._where,
                hint="look at who made the link, and remove it",
            )

    async def _write_draft(self, draft: str, file: File) -> None:
        # Closed to others from the start: the final mode comes when the content is there.
        private = asyncssh.SFTPAttrs(permissions=0o600)
        async with self._sftp.open(draft, "xb", attrs=private) as out:
            await out.write(file.content)
            await out.chmod(file.mode)
            with contextlib.suppress(asyncssh.SFTPOpUnsupported):
                await out.fsync()

    async def _is(self, path: str, file: File) -> bool:
        with self._errors(path):
            try:
                found = await self._sftp.lstat(path)
            except asyncssh.SFTPNoSuchFile:
                return False
        mode = found.permissions or 0
        if stat.S_ISDIR(mode):
            raise FileDenied(
                f"expected a file at {path}, found a directory",
                host=self._where,
                hint="a container may have made it as a mount point; remove it if it is empty",
            )
        if not stat.S_ISREG(mode) or stat.S_IMODE(mode) != file.mode:
            return False
        return found.size == len(file.content) and await self.read(path) == file.content

    async def _make_dir(self, path: str, mode: int, created: list[str]) -> None:
        if path in ("/", "", "."):
            return
        with self._errors(path):
            try:
                found = await self._sftp.stat(path)
            except asyncssh.SFTPNoSuchFile:
                pass
            else:
                self._want_dir(path, found)
                return
            await self._make_dir(posixpath.dirname(path), mode, created)
            if await self._mkdir(path, mode):
                created.append(path)

    async def _mkdir(self, path: str, mode: int) -> bool:
        try:
            await self._sftp.mkdir(path)
        except asyncssh.SFTPError:
            # Somebody may have been quicker: old servers have no code of its own for that.
            if await self._sftp.isdir(path):
                return False
            raise
        # After mkdir, whose mode the server's umask cuts.
        await self._sftp.chmod(path, mode)
        return True

    def _want_dir(self, path: str, found: asyncssh.SFTPAttrs) -> None:
        if not stat.S_ISDIR(found.permissions or 0):
            raise FileDenied(
                f"expected a directory at {path}, found a file",
                host=self._where,
                hint="move it away, or give another directory",
            )

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (asyncssh.SFTPError, ConnectionError) as exc:
            raise sftp_error(exc, path, self._where) from None


def sftp_error(exc: Exception, path: str, where: str) -> PdDeployError:
    """What an SFTP server's answer means for `path`."""
    reason = exc.reason if isinstance(exc, asyncssh.SFTPError) else str(exc)
    if isinstance(exc, asyncssh.SFTPNoSuchFile | asyncssh.SFTPNoSuchPath):
        return FileMissing(f"{path} does not exist", path=path, host=where)
    if isinstance(exc, asyncssh.SFTPPermissionDenied | asyncssh.SFTPWriteProtect):
        return FileDenied(
            f"the SSH user may not touch {path}",
            host=where,
            hint="log in as its owner, or give the user a directory of its own",
        )
    if isinstance(exc, asyncssh.SFTPConnectionLost | asyncssh.SFTPNoConnection | ConnectionError):
        return ConnectionDropped(f"the connection was lost while at {path}", host=where)
    if isinstance(exc, asyncssh.SFTPNoSpaceOnFilesystem) or NO_SPACE in reason:
        return DiskFull(f"no space left for {path}", host=where, hint="free some")
    return HostError(f"{path}: the SFTP server says {reason!r}", host=where)


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs them at the same time; the first error stops the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _is_below(path: str, root: str) -> bool:
    return path != root and posixpath.commonpath([path, root]) == root
