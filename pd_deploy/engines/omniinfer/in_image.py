"""What runs in a throwaway container of an image, to say what the image is.

It reads files, asks nginx for its version, and imports nothing of an engine. Its source is sent to
whatever Python the image has, so it needs no more than the standard library of 3.9.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

MARK = "pd-deploy: the image is "
TREES = ("workspace/omniinfer", "workspace/omni-npu")
SCRIPTS = ("tools/deploy/start_server", "tools/scripts")
LAUNCHER = "start_api_servers.py"
PROGRAMS = (LAUNCHER, "pd_run.sh", "global_proxy.sh", "omni_proxy.sh")
PACKAGES = ("omni-infer", "omniinfer", "omni-npu", "vllm", "torch", "torch-npu")
SOURCES = {"omni", "omni_npu"}  # packages whose sources say what the engine can do
CANN = (
    "usr/local/Ascend/ascend-toolkit/latest/*/ascend_toolkit_install.info",
    "usr/local/Ascend/ascend-toolkit/latest/version.cfg",
    "usr/local/Ascend/cann*/version.cfg",
    "usr/local/Ascend/latest/version.cfg",
)
NGINX = ("usr/local/nginx/nginx", "usr/local/nginx/sbin/nginx", "usr/sbin/nginx")
NGINX_MODULES = ("usr/local/nginx/modules/*.so", "usr/lib/nginx/modules/*.so")
NOT_WALKED = {".git", "tests", "test", "__pycache__", "node_modules", "docs"}
MOST_BYTES = 2 << 20  # of a source file; larger ones are generated
NGINX_S = 10
FLAG = r"--[a-z][\w-]*"


def look(root: Path) -> dict[str, Any]:
    """Return what the image below a directory is."""
    of_trees = [path for tree in TREES for path in files(root / tree)]
    packages = site_packages(root)
    places = find_programs(root, of_trees)
    programs = {name: f"/{paths[0].relative_to(root)}" for name, paths in places.items()}
    launcher = programs.get(LAUNCHER)
    return {
        "script_directory": str(Path(launcher).parent) if launcher else "",
        "programs": programs,
        "flags": {name: first_flags(paths) for name, paths in places.items()},
        "packages": versions(root, packages),
        **of_sources([*of_trees, *(f for place in packages for f in sources(place))]),
        **nginx(root),
        "commit": commit(root),
    }


def files(tree: Path) -> Iterator[Path]:
    """List a tree's files, but for those that are of no use."""
    for directory, below, names in os.walk(tree):
        below[:] = sorted(set(below) - NOT_WALKED)
        yield from (Path(directory, name) for name in sorted(names))


def find_programs(root: Path, paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Find launchers and proxies; those in the directories for scripts come before all others."""
    places = [root / TREES[0] / directory for directory in SCRIPTS]

    def rank(path: Path) -> tuple[int, int, str]:
        place = places.index(path.parent) if path.parent in places else len(places)
        return place, len(path.parts), str(path)

    found: dict[str, list[Path]] = {}
    for path in sorted((path for path in paths if path.name in PROGRAMS), key=rank):
        found.setdefault(path.name, []).append(path)
    return {name: found[name] for name in PROGRAMS if name in found}


def first_flags(programs: Iterable[Path]) -> list[str]:
    """Read the flags of a program, of which the first places may only call the next one."""
    return next(filter(None, map(flags, programs)), [])


def flags(program: Path) -> list[str]:
    """Read a program's flags from its source: those that calls add, or that a `case` knows."""
    source = text(program)
    if program.suffix == ".sh":
        cases = re.findall(rf"^\s*((?:-[\w-]+\s*\|\s*)*{FLAG})\s*\)", source, re.MULTILINE)
        return sorted({flag for case in cases for flag in re.findall(FLAG, case)})
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:
        return []
    words = [word.value for call in calls for word in call.args if isinstance(word, ast.Constant)]
    return sorted({w for w in words if isinstance(w, str) and re.fullmatch(FLAG, w)})


def site_packages(root: Path) -> list[Path]:
    """List the directories with packages: where this Python looks, or what is below a test's."""
    if root == Path("/"):
        return [Path(path) for path in sys.path if path]
    return sorted(root.glob("usr/**/*-packages"))


def versions(root: Path, places: Iterable[Path]) -> dict[str, str]:
    """Read the versions of packages from their metadata, and that of CANN from its file."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions(path=[str(place) for place in places]):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in PACKAGES:
            found.setdefault(name, distribution.version)
    for path in (path for pattern in CANN for path in sorted(root.glob(pattern))):
        version = re.search(r"(?im)^(?:\w+_running_)?version=(?:\[[^:\]]*:)?([\w.]+)", text(path))
        if version:
            found.setdefault("CANN", version[1])
    return {name: found[name] for name in (*PACKAGES, "CANN") if name in found}


def sources(place: Path) -> Iterator[Path]:
    """List the files of the engine's packages in a directory with packages."""
    for name in sorted(SOURCES):
        yield from files(place / name)


def of_sources(paths: Iterable[Path]) -> dict[str, Any]:
    """Read from source text which KV connectors there are, and what they go by."""
    connectors: set[str] = set()
    pairing: set[str] = set()
    ranktables = False
    for path in sorted({path for path in paths if path.suffix == ".py"}):
        if not SOURCES.intersection(path.parts):
            continue
        source = text(path)
        connectors.update(re.findall(r"register\w*\(\s*[\"'](\w*Connector\w*)[\"']", source))
        pairing.update(re.findall(r"decode_tp_size\s*=\s*(\S+)", source))
        ranktables = ranktables or "RANK_TABLE_FILE_PATH" in source
    meaning = "prefill pods + 1" if pairing else None
    if any("kv_parallel_size" in value for value in pairing):
        meaning = "decode's tensor parallel size"
    return {
        "connectors": sorted(connectors),
        "kv_parallel_size": meaning,
        "ranktables": ranktables if connectors else None,
    }


def nginx(root: Path) -> dict[str, Any]:
    """Ask nginx for its version and modules, and list the modules that lie beside it."""
    programs = [root / path for path in NGINX if (root / path).is_file()]
    if not programs:
        return {"nginx": "", "nginx_modules": []}
    try:
        command = [str(programs[0]), "-V"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=NGINX_S, check=False)
        answer = said.stderr
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    version = re.search(r"nginx/([\d.]+)", answer)
    modules = {Path(path).name for path in re.findall(r"--add(?:-dynamic)?-module=(\S+)", answer)}
    modules |= {path.stem for pattern in NGINX_MODULES for path in root.glob(pattern)}
    return {"nginx": version[1] if version else "not known", "nginx_modules": sorted(modules)}


def commit(root: Path) -> str:
    """Read the commit of the sources, where they came with their history."""
    for tree in TREES:
        git = root / tree / ".git"
        head = text(git / "HEAD").strip()
        if head.startswith("ref: "):
            ref = head[len("ref: ") :]
            packed = re.search(
                rf"^([0-9a-f]{{40}}) {re.escape(ref)}$", text(git / "packed-refs"), re.MULTILINE
            )
            head = text(git / ref).strip() or (packed[1] if packed else "")
        if re.fullmatch(r"[0-9a-f]{40}", head):
            return head
    return ""


def text(path: Path) -> str:
    """Read a text file, "" where there is none."""
    try:
        if path.stat().st_size <= MOST_BYTES:
            return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        pass
    return ""


if __name__ == "__main__":
    print(MARK + json.dumps(look(Path("/"))))
