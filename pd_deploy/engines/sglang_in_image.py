"""What runs in a throwaway container of an image of SGLang, to say which options its server takes.

It reads files and imports nothing of SGLang, which needs devices. Its source is sent to whatever
Python the image has, so it needs no more than the standard library of 3.9.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

MARK = "pd-deploy: the image is "
SERVER = "sglang.launch_server"
PACKAGES = ("sglang", "sglang-router", "torch", "torch-npu")
# Older versions add each option by a call; newer ones have a field for each, in several files.
SOURCES = ("srt/server_args.py", "srt/arg_groups/**/*.py")
FIELD = ("A", "Annotated")
FLAG = re.compile(r"--[a-z][\w-]*")


def look(package: Path | None) -> dict[str, Any]:
    """Return what SGLang's package is and takes."""
    options = sorted(set(flags(package))) if package else []
    return {"flags": {SERVER: options} if options else {}, "packages": dict(versions())}


def flags(package: Path) -> Iterator[str]:
    """Read every name that may be an option's; some may be none, as one that is only mentioned."""
    for path in (path for pattern in SOURCES for path in package.glob(pattern)):
        try:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from FLAG.findall(node.value) if FLAG.fullmatch(node.value) else ()
            elif isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Subscript):
                form, target = node.annotation.value, node.target
                if getattr(form, "id", "") in FIELD and isinstance(target, ast.Name):
                    yield "--" + target.id.replace("_", "-")


def versions() -> Iterator[tuple[str, str]]:
    """List the versions of the packages that tell images apart."""
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def package_of(name: str) -> Path | None:
    """Find a package without importing it."""
    spec = util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


if __name__ == "__main__":
    print(MARK + json.dumps(look(package_of("sglang"))))
