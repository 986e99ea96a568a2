"""Files and directories of a machine."""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass


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


class Disk:
    """Paths and what is there; `free` is in bytes."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {"/": Entry(None, 0o755)}
        self.free = 1 << 40

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
