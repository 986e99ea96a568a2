"""Reading a source tree where pd-deploy runs: a directory, or a commit of a git repository.

Of a directory in a git tree the files are read that git does not ignore, changed or not. Git runs
without hooks, prompts and the repository's own programs; how it logs in is the user's own affair.
"""

import contextlib
import hashlib
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pd_deploy.code import tree
from pd_deploy.code.tree import Entry, Tree
from pd_deploy.config.fields import split_code_source
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts.scratch import Scratch

KEY = "code.source"
CACHE = Path("~/.cache/pd-deploy/code").expanduser()
GIT_S = 600  # to fetch a large repository; all else takes moments
_QUIET = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh",
    "LC_ALL": "C",
}
# A tree may be anybody's: its configuration names programs that git would start.
_SAFELY = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false")


@dataclass(frozen=True)
class Source:
    """A tree as it was read.

    Attributes:
        directory: where its files are.
        commit: that it is based on; "" if it is not in a git tree.
        left_out: what of it is not deployed, and why.
        keep: keeps a directory that was made for it, for as long as it is needed.
    """

    directory: Path
    tree: Tree
    commit: str = ""
    left_out: tuple[str, ...] = ()
    keep: Any = field(default=None, repr=False, compare=False)

    @property
    def detail(self) -> str:
        """What it is, in a line."""
        size = sum(entry.size for entry in self.tree.entries)
        of = f" of commit {self.commit[:12]}" if self.commit else ""
        left_out = f"; left out: {'; '.join(self.left_out)}" if self.left_out else ""
        files = f"{len(self.tree.entries)} files{of}, {tree.size_shown(size)}"
        return f"{files}, digest {self.tree.digest[:12]}{left_out}"

    def content(self, entry: Entry) -> bytes:
        """Read a file's content.

        Raises:
            InvalidInput: it has changed since the tree was read.
        """
        try:
            content = (self.directory / entry.path).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            found = f"expected the tree as it was read, found {tree.shown([entry.path])} changed"
            raise InvalidInput([Problem(KEY, f"{found} while it was sent; run it again")])
        return content


def stamp(source: str) -> object:
    """Return what is another whenever a tree may have changed; its files are not read.

    Raises:
        InvalidInput: there is no tree.
    """
    if split_code_source(source)[1]:
        return source
    top = _existing(source)
    listed, _ = _listed(top)
    stamps = []
    for path in listed:
        with contextlib.suppress(OSError):
            status = (top / path).lstat()
            stamps.append((path, status.st_mode, status.st_size, status.st_mtime_ns))
    return _commit(top), stamps


def read(source: str, patches: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Source:
    """Read a source tree.

    Args:
        patches: directory in the tree → patches, also in the tree, that are applied there, in their
            order, to a copy.

    Raises:
        InvalidInput: there is none, it has files that can't be deployed, of which all are named, or
            a patch can't be applied.
    """
    url, commit = split_code_source(source)
    found = _cloned(url, commit) if commit else _of_directory(source)
    return _patched(found, patches) if patches else found


def _patched(source: Source, patches: Mapping[str, Sequence[str]]) -> Source:
    keep = Scratch()
    top = keep.path
    for entry in source.tree.entries:
        place = top / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "link":
            place.symlink_to(entry.target)
        else:
            place.write_bytes(source.content(entry))
            place.chmod(0o755 if entry.kind == "program" else 0o644)
    alone = {"GIT_CEILING_DIRECTORIES": str(top.parent)}
    for directory, names in patches.items():
        where = top / directory
        for name in names:
            applied = ("apply", "--whitespace=nowarn", str(top / name))
            done = _run(where, applied, alone) if where.is_dir() else None
            if done is None or done.returncode != 0:
                said = os.fsdecode(done.stderr).strip() if done else "no such directory"
                message = f"expected that {name} applies in {directory}, found: {said[-300:]}"
                raise InvalidInput([Problem("code.patches", message)])
    made, _ = _entries(top, _walked(top))
    return replace(source, directory=top, tree=made, keep=keep)


def _of_directory(source: str) -> Source:
    top = _existing(source)
    listed, ignored = _listed(top)
    made, left_out = _entries(top, listed)
    if ignored:
        left_out.insert(0, f"{tree.shown(ignored)} (ignored by git)")
    return Source(top, made, _commit(top), tuple(left_out))


def _existing(source: str) -> Path:
    directory = Path(source)
    if not directory.is_dir():
        raise _invalid(f"expected a directory, found {'a file' if directory.exists() else 'none'}")
    return directory.resolve()


def _commit(top: Path) -> str:
    head = _git(top, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False)
    return head.strip()


def _listed(top: Path) -> tuple[list[str], list[str]]:
    """List a directory's files, and what git ignores of it."""
    # Git itself may refuse to read a tree, such as another user's; that is no tree without git.
    if not any((above / ".git").exists() for above in (top, *top.parents)):
        return _walked(top), []
    _git(top, "rev-parse", "--show-toplevel")
    options = ("ls-files", "-z", "--exclude-standard", "--others")
    found = _names(_git(top, *options, "--cached"))
    ignored = _names(_git(top, *options, "--ignored", "--directory"))
    ignored = [path for path in ignored if tree.why_left_out(path.rstrip("/")) != "made"]
    listed: list[str] = []
    for path in found:
        below = top / path
        # A repository of its own within the tree, such as a clone or a submodule.
        if below.is_dir() and not below.is_symlink():
            inner, also_ignored = _listed(below) if (below / ".git").exists() else ([], [])
            listed += [f"{path.rstrip('/')}/{name}" for name in inner]
            ignored += [f"{path.rstrip('/')}/{name}" for name in also_ignored]
        else:
            listed.append(path)
    return listed, ignored


def _walked(top: Path) -> list[str]:
    listed: list[str] = []
    for directory, below, names in os.walk(top):
        below[:] = [name for name in below if tree.why_left_out(name) != "made"]
        links = [name for name in below if Path(directory, name).is_symlink()]
        listed += [str(Path(directory, name).relative_to(top)) for name in (*names, *links)]
        if len(listed) > tree.MOST_FILES:
            break
    return listed


def _names(output: str) -> list[str]:
    return [name for name in output.split("\0") if name]


def _entries(top: Path, listed: Sequence[str]) -> tuple[Tree, list[str]]:
    """Read files; return the tree that they make, and what was left out, by reason.

    Raises:
        InvalidInput: links that lead out of the tree, files that are too large, or too many.
    """
    entries: list[Entry] = []
    left_out: dict[str, list[str]] = {}
    problems: dict[str, list[str]] = {}
    total = 0
    for path in sorted(set(listed), key=os.fsencode):
        why = tree.why_left_out(path)
        place = top / path
        try:
            status = place.lstat()
        except OSError:
            continue  # git still has it, but it was deleted
        if why != "made" and place.parent.resolve() != place.parent:
            continue  # git still has it, but there is a link in its place
        if not why and not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            why = "neither a file nor a link"
        if why:
            left_out.setdefault(why, []).append(path)
        elif stat.S_ISLNK(status.st_mode):
            target = str(place.readlink())
            if tree.leads_out(path, target):
                problems.setdefault("links that stay in the tree", []).append(path)
            entries.append(_link(path, target))
        elif status.st_size > tree.MOST_FILE_BYTES:
            most = f"files of at most {tree.MOST_FILE_BYTES >> 20} MiB"
            problems.setdefault(most, []).append(path)
        else:
            total += status.st_size
            entries.append(_file(path, place, status))
        if total > tree.MOST_BYTES or len(entries) > tree.MOST_FILES:
            most = f"at most {tree.MOST_FILES} files and {tree.MOST_BYTES >> 30} GiB"
            problems.setdefault(most, []).append("more")
            break
    if problems:
        raise InvalidInput(
            [
                Problem(KEY, f"expected {rule}, found {tree.shown(p)}")
                for rule, p in problems.items()
            ],
            hint="what no engine needs can be left out by .gitignore, or moved out of the tree",
        )
    if not entries:
        raise _invalid(f"expected source code in {top}, found no file that git does not ignore")
    left_out.pop("made", None)
    return Tree(tuple(entries)), [f"{tree.shown(p)} ({why})" for why, p in left_out.items()]


def _link(path: str, target: str) -> Entry:
    return Entry(path, "link", hashlib.sha256(os.fsencode(target)).hexdigest(), 0, target)


def _file(path: str, place: Path, status: os.stat_result) -> Entry:
    try:
        with place.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _invalid(f"{tree.shown([path])} can't be read: {error.strerror}") from None
    kind = "program" if status.st_mode & stat.S_IXUSR else "file"
    return Entry(path, kind, digest, status.st_size)  # type: ignore[arg-type]


def _cloned(url: str, commit: str) -> Source:
    """Read a commit of a repository, whose objects are kept for the next run."""
    cache = CACHE / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.git"
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _git(cache.parent, "init", "--quiet", "--bare", str(cache))
    if _git(cache, "cat-file", "-t", commit, check=False).strip() != "commit":
        # Not every server gives a commit by itself; then all branches and tags are fetched.
        shallow = ("fetch", "--quiet", "--depth=1", "--no-tags", "--", url, commit)
        if not _succeeds(cache, *shallow):
            _git(cache, "fetch", "--quiet", "--tags", "--", url, "+refs/heads/*:refs/heads/*")
        if _git(cache, "cat-file", "-t", commit, check=False).strip() != "commit":
            raise _invalid(f"expected the commit {commit} in {url}, found none")
    keep = Scratch()
    made = keep.path
    index = {"GIT_INDEX_FILE": f"{made}/.git-index"}
    work = (f"--git-dir={cache}", f"--work-tree={made}")
    _git(made, *work, "read-tree", commit, environment=index)
    _git(made, *work, "checkout-index", "--all", "--quiet", environment=index)
    (made / ".git-index").unlink()
    listing = _git(cache, "ls-tree", "-r", "-z", commit)
    submodules = [row.partition("\t")[2] for row in _names(listing) if row.startswith("160000 ")]
    made_tree, left_out = _entries(made, _walked(made))
    if submodules:
        left_out.append(f"{tree.shown(submodules)} (submodules)")
    return Source(made, made_tree, commit, tuple(left_out), keep)


def _succeeds(directory: Path, *arguments: str) -> bool:
    return _run(directory, arguments, {}).returncode == 0


def _git(
    directory: Path,
    *arguments: str,
    check: bool = True,
    environment: dict[str, str] | None = None,
) -> str:
    done = _run(directory, arguments, environment or {})
    if check and done.returncode != 0:
        said = os.fsdecode(done.stderr).strip().splitlines()
        command = next(word for word in arguments if not word.startswith("-"))
        raise _invalid(f"`git {command}` failed: {said[0] if said else 'no message'}")
    return os.fsdecode(done.stdout)


def _run(
    directory: Path, arguments: Sequence[str], environment: dict[str, str]
) -> "subprocess.CompletedProcess[bytes]":
    # Git's own variables, such as a hook's that started pd-deploy, name another repository.
    inherited = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        return subprocess.run(
            ["git", *_SAFELY, "-C", str(directory), *arguments],
            env={**inherited, **_QUIET, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_S,
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, b"", b"git is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            arguments, 124, b"", f"no answer within {GIT_S} s".encode()
        )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput([Problem(KEY, message)])
