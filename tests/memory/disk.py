"""Files and directories of a machine."""

import errno
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 4096


@dataclass
class Entry:
    """A file, or a directory if it has no content; `changed` is in seconds."""

    content: bytes | None
    mode: int
    changed: float = 0.0

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.content is None


@dataclass
class Volume:
    """A file system: how many blocks it has, and whether it is mounted read-only."""

    blocks: int = (1 << 40) // BLOCK
    read_only: bool = False


class Disk:
    """Paths and what is there. Each file takes as many blocks as it fills in part.

    Attributes:
        volumes: by the directory on which one is mounted.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {"/": Entry(None, 0o755)}
        self.volumes: dict[str, Volume] = {"/": Volume()}

    def mount(self, path: str) -> Volume:
        """A file system of its own at a directory, with what is there already."""
        self.add_directory(path)
        self.volumes[path] = Volume()
        return self.volumes[path]

    def fill(self, path: str) -> None:
        """Lets something else take all free blocks of the file system at a path."""
        place = self._place(path)
        self.volumes[place].blocks = self._used(place)

    def free(self, path: str) -> int:
        """Bytes free at a path."""
        place = self._place(path)
        return (self.volumes[place].blocks - self._used(place)) * BLOCK

    def may_change(self, path: str) -> None:
        """Raises OSError if the file system at a path is read-only."""
        if self.volumes[self._place(path)].read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def make_room(self, path: str, size: int) -> None:
        """Raises OSError if a file can't become so large."""
        self.may_change(path)
        there = self.get(path)
        more = _blocks(size) - _blocks(len((there and there.content) or b""))
        if more > 0 and more * BLOCK > self.free(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _place(self, path: str) -> str:
        places = [p for p in self.volumes if f"{path}/".startswith(f"{p.rstrip('/')}/")]
        return max(places, key=len)

    def _used(self, place: str) -> int:
        return sum(
            _blocks(len(content))
            for path, content in self.files(place)
            if self._place(path) == place
        )

    def get(self, path: str) -> Entry | None:
        """What is at a path."""
        return self.entries.get(posixpath.normpath(path))

    def read(self, path: str) -> str:
        """A file's text; empty if there is none."""
        found = self.get(path)
        return (found.content or b"").decode() if found else ""

    def put(self, path: str, content: bytes, mode: int = 0o644, changed: float = 0.0) -> None:
        """A file, with the directories above it."""
        self.add_directory(posixpath.dirname(path))
        self.entries[path] = Entry(content, mode, changed)

    def add_directory(self, path: str) -> None:
        """A directory and those above it."""
        while path not in self.entries:
            self.entries[path] = Entry(None, 0o755)
            path = posixpath.dirname(path)

    def below(self, path: str) -> list[str]:
        """All paths below a directory, sorted."""
        return sorted(p for p in self.entries if p.startswith(f"{path.rstrip('/')}/"))

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        root = f"{path.rstrip('/')}/"
        return [p.removeprefix(root) for p in self.below(path) if "/" not in p.removeprefix(root)]

    def files(self, path: str) -> Iterator[tuple[str, bytes]]:
        """Files below a directory, with their content."""
        for found in self.below(path):
            content = self.entries[found].content
            if content is not None:
                yield found, content

    def remove(self, path: str) -> None:
        """Removes a file, or a directory with all below it."""
        for one in (*self.below(path), path):
            self.entries.pop(one, None)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
