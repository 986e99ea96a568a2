"""What runs in a throwaway container, to say which code an engine would run there.

It hashes the trees that it is told, and imports a package. Its source is sent to whatever Python
the image has, so it needs no more than the standard library of 3.9. Whoever reads a tree where
pd-deploy runs computes its digest by the same function.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MARK = "pd-deploy: the code is "
PART_BYTES = 1 << 20
# What is missing where there are no devices; it says nothing about the code.
MISSING = (ImportError, OSError, RuntimeError)

Entry = tuple[bytes, str, str]
"""A path, its kind (file, program, link), and the sha256 of its content, or of where it leads."""


def digest_of(entries: Iterable[Entry]) -> str:
    """Return the digest of a tree: directories count only by what is in them."""
    whole = hashlib.sha256()
    for path, kind, content in sorted(entries):
        whole.update(b"\0".join((path, kind.encode(), content.encode(), b"")))
    return whole.hexdigest()


def look(root: str) -> str:
    """Return the digest of the tree below a directory."""
    top = Path(root)
    paths = [
        Path(directory, name)
        for directory, below, names in os.walk(top)
        for name in (*names, *below)
        if name in names or Path(directory, name).is_symlink()
    ]
    return digest_of((os.fsencode(path.relative_to(top)), *content_of(path)) for path in paths)


def content_of(path: Path) -> tuple[str, str]:
    """Return the kind of a file or link, and its sha256."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "link", hashlib.sha256(os.fsencode(path.readlink())).hexdigest()
    content = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            content.update(part)
    return "program" if mode & stat.S_IXUSR else "file", content.hexdigest()


def imported(package: str, tree: str) -> dict[str, Any]:
    """Import a package, and say where it is; `fault` is an error of its own, `missing` one that an
    import may end with where there are no devices."""
    answer = {"package": "", "fault": "", "missing": ""}
    try:
        found = importlib.util.find_spec(package)
        places = [found.origin or "", *(found.submodule_search_locations or ())] if found else []
        resolved = [Path(path).resolve() for path in places if path and Path(path).exists()]
        answer["package"] = str(resolved[0]) if resolved else ""
        if resolved and Path(tree).resolve() in resolved[0].parents:
            importlib.import_module(package)
    except MISSING as error:
        answer["missing"] = f"{type(error).__name__}: {error}"[:500]
    except Exception as error:
        answer["fault"] = f"{type(error).__name__}: {error}"[:500]
    return answer


def main(question: str) -> None:
    """Answer a question: `trees` by name, and the `package` to import, with the tree of it."""
    asked = json.loads(question)
    # Not from wherever the image's containers start: an engine starts elsewhere.
    sys.path[:] = [path for path in sys.path if path]
    answer: dict[str, Any] = {"trees": {name: look(path) for name, path in asked["trees"].items()}}
    if asked.get("package"):
        answer.update(imported(asked["package"], asked["path"]))
    print(MARK + json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
