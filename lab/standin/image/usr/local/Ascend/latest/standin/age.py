"""The age of what runs: a contract, and the day on which it was built.

It is the image's, but for code that lies in a source tree with an age of its own, as one that
somebody has checked out and mounted over the image's: such code is of the tree's age.
"""

from datetime import date
from pathlib import Path
from typing import Any

from standin.rules import RULES, Refusal, host_path

_DIRECTORY = "/usr/local/Ascend/latest/standin"
_OF_TREE = "STANDIN_AGE"  # at the top of a source tree: a contract and a day
_tree: dict[str, str] = {}


def follow(file: str) -> None:
    """Take the age of the source tree that a file lies in from now on, if that has one of its own.

    What a tree brings decides: its launcher goes by it, the engine by the package that it imports.
    """
    marks = (directory / _OF_TREE for directory in Path(file).resolve().parents)
    mark = next((mark for mark in marks if mark.is_file()), None)
    if mark:
        _tree.update(zip(("contract", "built"), mark.read_text().split(), strict=True))


def contract() -> str:
    """Return the contract: v0 (its date says how early), v1 or roles.

    Raises:
        Refusal: the file `contract` names none of these.
    """
    name = _tree.get("contract") or _file("contract").read_text().strip()
    if name not in ("v0", *RULES["later"]["contracts"]):
        raise Refusal("contract", repr(name))
    return name


def table(name: str) -> dict[str, Any]:
    """Return a table of rules.json as the contract has it."""
    if contract() == "v0":
        return RULES[name]
    later, mine = RULES["later"], RULES["later"]["contracts"][contract()]
    return later[name] | mine.get(name, {})


def value(name: str) -> Any:
    """Return a single value of rules.json as the contract has it."""
    return (RULES if contract() == "v0" else RULES["later"])[name]


def has(change: str) -> bool:
    """Tell whether it was built on or after the day of a change named in rules.json.

    Raises:
        Refusal: the file `built` holds no ISO date.
    """
    return built() >= date.fromisoformat(RULES["changes"][change]["since"])


def built() -> date:
    """Return the day on which it was built.

    Raises:
        Refusal: the file `built` holds no ISO date.
    """
    file = _file("built")
    try:
        return date.fromisoformat(_tree.get("built") or file.read_text().strip())
    except (OSError, ValueError) as error:
        raise Refusal("built", f"{file}: {error}") from None


def _file(name: str) -> Path:
    # Tests without root run the files of one image below several roots, each with its own age.
    below_root = Path(host_path(f"{_DIRECTORY}/{name}"))
    return below_root if below_root.is_file() else Path(__file__).parent / name
