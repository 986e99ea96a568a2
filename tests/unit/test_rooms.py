"""The rooms of pd_deploy: who may import whom."""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each may import those before it, and itself.
ROOMS = (
    "errors",
    "config",
    "hosts",
    "engines",
    "records",
    "planning",
    "registry",
    "steps",
    "verify",
)
OUTER = ("tasks", "flows", "cli")


def room_of(module: str) -> str:
    """The room of a module of pd_deploy: its first part, and `verify` within the steps."""
    parts = module.split(".")[1:]
    return "verify" if parts[:2] == ["steps", "verify"] else (parts or ["errors"])[0]


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """The modules of our own that a file imports, with the line."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = ROOT / node.module.replace(".", "/") / alias.name
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield (f"{node.module}.{alias.name}" if is_module else node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)


def test_imports_point_one_way() -> None:
    wrong = []
    for file in (ROOT / "pd_deploy").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for imported, line in imports(file):
            first = imported.split(".")[0]
            if first in (*OUTER, "blocks", "prefect", "lab", "tests"):
                wrong.append(f"{file}:{line} imports {imported}")
            elif first == "pd_deploy" and module != "pd_deploy":
                here, there = room_of(module), room_of(imported)
                if ROOMS.index(there) > ROOMS.index(here):
                    wrong.append(f"{file}:{line}: {here} imports {there} ({imported})")
    assert wrong == []


@pytest.mark.parametrize(("inner", "outer"), list(pairwise(("pd_deploy", *OUTER))))
def test_what_lies_inside_knows_nothing_of_what_lies_around_it(inner: str, outer: str) -> None:
    known = {name for file in (ROOT / inner).rglob("*.py") for name, _ in imports(file)}
    assert [name for name in known if name.split(".")[0] == outer] == []


def test_nothing_hides_a_circle() -> None:
    files = (ROOT / "pd_deploy").rglob("*.py")
    assert [f for f in files if "TYPE_CHECKING" in f.read_text()] == []


def test_every_room_says_what_belongs_there() -> None:
    for room in (ROOT / "pd_deploy").rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(room.read_text()))
        assert text, f"{room} has no docstring"
