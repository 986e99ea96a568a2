"""A source tree as a value: its files with their digests, and what a host lacks of it. Pure."""

import io
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pd_deploy.code.in_container import digest_of

Kind = Literal["file", "program", "link"]
MOST_FILES = 50_000  # vLLM's tree has some 4,000
MOST_FILE_BYTES = 100 << 20  # GitHub takes no larger ones either; one is in memory while it is sent
MOST_BYTES = 2 << 30
BATCH_BYTES = 4 << 20  # sent at a time: bounds the memory, and what a lost connection costs
OBJECTS = "objects"
NEW = "new"
# Names of files that hold keys and passwords; nobody wants them on all hosts.
_SECRETS = re.compile(
    r"\.env(\..+)?|id_(rsa|dsa|ecdsa|ed25519)(\..+)?|.+\.(pem|key|p12|pfx)"
    r"|\.netrc|\.git-credentials|\.pypirc|\.npmrc|\.htpasswd",
    re.IGNORECASE,
)
# Made by Python and by git themselves, on every machine anew.
_MADE = frozenset({".git", "__pycache__"})


@dataclass(frozen=True)
class Entry:
    """A file of a tree, a program (executable by its owner), or a link.

    `path` is relative to the tree, with bytes that are no UTF-8 as surrogates. `sha256` is of its
    content, or of where it leads; `size` in bytes.
    """

    path: str
    kind: Kind
    sha256: str
    size: int = 0
    target: str = ""

    @property
    def object(self) -> str:
        """The name of its content on hosts, where files of the same content and mode are one."""
        return f"{self.sha256}x" if self.kind == "program" else self.sha256


@dataclass(frozen=True)
class Tree:
    """Files and links, sorted by path."""

    entries: tuple[Entry, ...]

    @cached_property
    def digest(self) -> str:
        """What the tree is called."""
        return digest_of((os.fsencode(e.path), e.kind, e.sha256) for e in self.entries)

    @cached_property
    def objects(self) -> Mapping[str, Entry]:
        """What is in its files, by name of the object; each has the first file with it."""
        files = [entry for entry in self.entries if entry.kind != "link"]
        return {entry.object: entry for entry in reversed(files)}

    def without(self, paths: Collection[str]) -> "Tree":
        """Leave out files and directories."""
        kept = (e for e in self.entries if not any(is_within(e.path, path) for path in paths))
        return Tree(tuple(kept))

    def archive(self) -> bytes:
        """Make a tar that lays the tree out below `new`, from objects that are beside it.

        Of a file it has a hard link to its object: a host keeps each content once.
        """
        members = [_directory(path) for path in (NEW, *self._directories())]
        for entry in self.entries:
            member = tarfile.TarInfo(f"{NEW}/{entry.path}")
            is_link = entry.kind == "link"
            member.type = tarfile.SYMTYPE if is_link else tarfile.LNKTYPE
            member.linkname = entry.target if is_link else f"{OBJECTS}/{entry.object}"
            members.append(member)
        return tar((member, b"") for member in members)

    def _directories(self) -> list[str]:
        above: set[str] = set()
        for entry in self.entries:
            parts = entry.path.split("/")[:-1]
            above.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
        return [f"{NEW}/{path}" for path in sorted(above)]


def lacking(trees: Iterable[Tree], present: Collection[str]) -> list[Entry]:
    """List files with the contents that a host lacks, each content once."""
    wanted = {name: entry for tree in trees for name, entry in tree.objects.items()}
    return [entry for name, entry in sorted(wanted.items()) if name not in present]


def batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Divide files into parts of some size, to be sent one after the other."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        if batch and size + entry.size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.size
    if batch:
        yield batch


def objects_archive(contents: Iterable[tuple[Entry, bytes]]) -> bytes:
    """Make a tar of objects."""
    return tar(
        (_member(entry.object, 0o755 if entry.kind == "program" else 0o644), content)
        for entry, content in contents
    )


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Make a tar whose members belong to root."""
    written = io.BytesIO()
    with tarfile.open(
        fileobj=written,
        mode="w",
        format=tarfile.GNU_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def is_within(path: str, top: str) -> bool:
    """Tell whether a path is another one or lies below it."""
    return f"{path}/".startswith(f"{top.rstrip('/')}/")


def why_left_out(path: str) -> str:
    """Say why a file is never deployed: "" if it may be, `made` where that goes without saying."""
    *directories, name = path.split("/")
    if _MADE.intersection((*directories, name)) or name.endswith(".pyc"):
        return "made"
    return "looks like a secret" if _SECRETS.fullmatch(name) else ""


def leads_out(path: str, target: str) -> bool:
    """Tell whether a link at a path in a tree leads out of it."""
    end = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return target.startswith("/") or end == ".." or end.startswith("../")


def size_shown(size: int) -> str:
    """Write a size in bytes for a message."""
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):.1f} KiB"


def shown(paths: Sequence[str], most: int = 5) -> str:
    """Write paths for a message, on one line; names may hold anything."""
    listed = [path if path.isprintable() else repr(path) for path in sorted(paths)[:most]]
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{', '.join(listed)}{more}"


def _member(name: str, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode = mode
    return member


def _directory(path: str) -> tarfile.TarInfo:
    member = _member(path, 0o755)
    member.type = tarfile.DIRTYPE
    return member
