"""Files of a host, by SFTP."""

import contextlib
import posixpath
import secrets
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import asyncssh

from pd_deploy.errors import (
    ConnectionDropped,
    DiskFull,
    DiskReadOnly,
    FileDenied,
    FileMissing,
    HostError,
    NotOurs,
    PdDeployError,
)

T = TypeVar("T")

# $1 a path, $2 bytes: writes as many beside the path, and takes them away again.
TRY = r"""dir=$(dirname -- "$1"); while [ ! -d "$dir" ]; do dir=$(dirname -- "$dir"); done
file=$dir/.try.$$.tmp; export LC_ALL=C; umask 077
head -c "$2" /dev/zero >"$file"; status=$?
rm -f -- "$file"; exit $status"""


@dataclass(frozen=True)
class File:
    """A file to be: its content and its permission bits."""

    content: bytes
    mode: int = 0o644


class Files:
    """The files of a host, read and written over one SFTP session.

    Args:
        sftp: the session.
        where: the host's name for messages.
        try_to_write: says what the system says to a file of some bytes beside a path. OpenSSH's
            server answers "Failure" to most faults, those of a full disk among them.
    """

    def __init__(
        self,
        sftp: asyncssh.SFTPClient,
        where: str,
        try_to_write: Callable[[str, int], Awaitable[str]],
    ) -> None:
        self._sftp = sftp
        self._where = where
        self._try = try_to_write

    async def write(self, path: str, file: File) -> bool:
        """Write a file atomically unless it is as it should be; return whether it was written."""
        if await self._is(path, file):
            return False
        draft = posixpath.join(
            posixpath.dirname(path), f".{posixpath.basename(path)}.{secrets.token_hex(4)}.tmp"
        )
        async with self._errors(path, len(file.content) + 1):
            try:
                await self._write_draft(draft, file)
                await self._sftp.posix_rename(draft, path)
            except BaseException:
                with contextlib.suppress(asyncssh.SFTPError):
                    await self._sftp.unlink(draft)
                raise
        return True

    async def read(self, path: str) -> bytes | None:
        """Read a file; None if there is none."""
        async with self._errors(path):
            try:
                async with self._sftp.open(path, "rb") as file:
                    content: bytes = await file.read()
                    return content
            except asyncssh.SFTPNoSuchFile:
                return None

    async def read_part(self, path: str, offset: int, size: int) -> bytes:
        """Read so many bytes of a file from an offset on, fewer at its end, none beyond it."""
        async with self._errors(path), self._sftp.open(path, "rb") as file:
            content: bytes = await file.read(size, offset)
            return content

    async def make_dirs(self, paths: Iterable[str], mode: int) -> list[str]:
        """Create directories with their parents; return those that were not there, sorted."""
        created: list[str] = []
        for path in sorted(set(paths)):
            await self._make_dir(posixpath.normpath(path), mode, created)
        return sorted(created)

    async def remove_tree(self, path: str, below: str) -> bool:
        """Remove what `path` names, if it lies strictly below `below`."""
        path = self._inside(path, below)
        async with self._errors(path, 1):
            try:
                await self._check_parent(path, below)
                attributes = await self._sftp.lstat(path)
            except asyncssh.SFTPNoSuchFile:
                return False
            # lstat, so that a link goes and what it points to stays.
            if stat.S_ISDIR(attributes.permissions or 0):
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
                hint="find out who made the link, and remove it",
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
        async with self._errors(path):
            try:
                attributes = await self._sftp.lstat(path)
            except asyncssh.SFTPNoSuchFile:
                return False
        mode = attributes.permissions or 0
        if stat.S_ISDIR(mode):
            raise FileDenied(
                f"expected a file at {path}, found a directory",
                host=self._where,
                hint="a container may have made it as a mount point; remove it if it is empty",
            )
        if not stat.S_ISREG(mode) or stat.S_IMODE(mode) != file.mode:
            return False
        return attributes.size == len(file.content) and await self.read(path) == file.content

    async def _make_dir(self, path: str, mode: int, created: list[str]) -> None:
        if path in ("/", "", "."):
            return
        async with self._errors(path, 1):
            try:
                attributes = await self._sftp.stat(path)
            except asyncssh.SFTPNoSuchFile:
                pass
            else:
                self._want_dir(path, attributes)
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

    def _want_dir(self, path: str, attributes: asyncssh.SFTPAttrs) -> None:
        if not stat.S_ISDIR(attributes.permissions or 0):
            raise FileDenied(
                f"expected a directory at {path}, found a file",
                host=self._where,
                hint="move it away, or name another directory",
            )

    @contextlib.asynccontextmanager
    async def _errors(self, path: str, written: int = 0) -> AsyncIterator[None]:
        """Raise what the server's answers mean; `written` is how many bytes were to be."""
        try:
            yield
        except asyncssh.SFTPFailure as exc:
            message = f"{exc.reason} {await self._try(path, written)}" if written else exc.reason
            raise disk_error(message, path, self._where) or sftp_error(
                exc, path, self._where
            ) from None
        except (asyncssh.SFTPError, ConnectionError) as exc:
            raise sftp_error(exc, path, self._where) from None


def disk_error(message: str, path: str, where: str) -> HostError | None:
    """Make the error for a file that its disk did not take, from the system's message."""
    message = message.lower()
    if "no space left" in message:
        return DiskFull(
            f"can't write {path}: its disk is full",
            host=where,
            hint="free some space or inodes (see `df` and `df -i`); `pd-deploy prune FILE` "
            "removes old generations",
        )
    if "quota exceeded" in message:
        return DiskFull(
            f"can't write {path}: the SSH user's disk quota is used up",
            host=where,
            hint="free some space",
        )
    if "read-only file system" in message:
        return DiskReadOnly(
            f"can't write {path}: its disk is mounted read-only",
            host=where,
            hint="`dmesg` says why (disk errors, for example); then `mount -o remount,rw`",
        )
    return None


def sftp_error(exc: Exception, path: str, where: str) -> PdDeployError:
    """Make the error that an SFTP server's answer means for `path`."""
    reason = exc.reason if isinstance(exc, asyncssh.SFTPError) else str(exc)
    if isinstance(exc, asyncssh.SFTPNoSuchFile | asyncssh.SFTPNoSuchPath):
        return FileMissing(f"{path} does not exist", path=path, host=where)
    if isinstance(exc, asyncssh.SFTPPermissionDenied):
        return FileDenied(
            f"the SSH user lacks permission for {path}",
            host=where,
            hint="log in as its owner, or give the user a directory of its own",
        )
    if isinstance(exc, asyncssh.SFTPConnectionLost | asyncssh.SFTPNoConnection | ConnectionError):
        return ConnectionDropped(
            f"the connection was lost during an operation on {path}", host=where
        )
    if isinstance(exc, asyncssh.SFTPNoSpaceOnFilesystem | asyncssh.SFTPQuotaExceeded):
        reason = "no space left"
    if isinstance(exc, asyncssh.SFTPWriteProtect):
        reason = "read-only file system"
    return disk_error(reason, path, where) or HostError(
        f"{path}: the SFTP server says only {reason!r}", host=where, hint="`dmesg` may say more"
    )


def _is_below(path: str, root: str) -> bool:
    return path != root and posixpath.commonpath([path, root]) == root
