"""The rooms of pd_deploy: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Each may import those before it, and itself. The last five are folders at the top of the
# repository; links in pd_deploy/ lead to them, so that what is installed has one name.
ROOMS = (
    "errors",
    "config",
    "hosts",
    "engines",
    "records",
    "planning",
    "importer",
    "registry",
    "code",
    "steps",
    "verify",
    "blocks",
    "tasks",
    "flows",
    "lab",
    "cli",
)
OF_PREFECT = ("blocks", "tasks", "flows", "cli")
FOLDERS = [folder for folder in sorted((ROOT / "pd_deploy").iterdir()) if folder.is_dir()]
FILES = [
    file.relative_to(ROOT)
    for folder in (ROOT / "pd_deploy", *FOLDERS)
    for file in sorted(folder.rglob("*.py") if folder in FOLDERS else folder.glob("*.py"))
    if "lab/standin" not in str(file)
]


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
    for file in FILES:
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        here = room_of(module)
        for imported, line in imports(ROOT / file):
            first = imported.split(".")[0]
            if first == "pd_deploy" and module != "pd_deploy":
                there = room_of(imported)
                if ROOMS.index(there) > ROOMS.index(here):
                    wrong.append(f"{file}:{line}: {here} imports {there} ({imported})")
            elif first == "prefect" and here not in OF_PREFECT:
                wrong.append(f"{file}:{line}: {here} imports {imported}")
            elif first in (*ROOMS, "tests", "demo", "bench"):
                wrong.append(f"{file}:{line}: {imported} is not part of pd_deploy")
    assert wrong == []


def test_the_lab_knows_nothing_of_what_it_proves() -> None:
    """What the lab learns of the originals comes from their documents, not from our own code."""
    files = [file for file in FILES if file.parts[1] == "lab"]
    wrong = [name for file in files for name, _ in imports(ROOT / file) if "pd_deploy" in name]
    assert [name for name in wrong if not name.startswith("pd_deploy.lab")] == []


def test_nothing_hides_a_circle() -> None:
    assert [f for f in FILES if "TYPE_CHECKING" in (ROOT / f).read_text()] == []


def test_every_room_says_what_belongs_there() -> None:
    for room in (file for file in FILES if file.name == "__init__.py"):
        text = ast.get_docstring(ast.parse((ROOT / room).read_text()))
        assert text, f"{room} has no docstring"
