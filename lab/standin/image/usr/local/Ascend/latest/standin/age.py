"""This image's age: its contract, and the day on which it was built."""

from datetime import date
from pathlib import Path
from typing import Any

from standin.rules import RULES, Refusal, host_path

_DIRECTORY = "/usr/local/Ascend/latest/standin"


def contract() -> str:
    """Return the contract: v0 (its date says how early), v1 or roles.

    Raises:
        Refusal: the file `contract` names none of these.
    """
    name = _file("contract").read_text().strip()
    if name not in ("v0", *RULES["later"]["contracts"]):
        raise Refusal("contract", repr(name))
    return name


def table(name: str) -> dict[str, Any]:
    """Return a table of rules.json as this image's contract has it."""
    if contract() == "v0":
        return RULES[name]
    later, mine = RULES["later"], RULES["later"]["contracts"][contract()]
    return later[name] | mine.get(name, {})


def value(name: str) -> Any:
    """Return a single value of rules.json as this image's contract has it."""
    return (RULES if contract() == "v0" else RULES["later"])[name]


def has(change: str) -> bool:
    """Tell whether the image was built on or after the day of a change named in rules.json.

    Raises:
        Refusal: the file `built` holds no ISO date.
    """
    return built() >= date.fromisoformat(RULES["changes"][change]["since"])


def built() -> date:
    """Return the day on which the image was built.

    Raises:
        Refusal: the file `built` holds no ISO date.
    """
    file = _file("built")
    try:
        return date.fromisoformat(file.read_text().strip())
    except (OSError, ValueError) as error:
        raise Refusal("built", f"{file}: {error}") from None


def _file(name: str) -> Path:
    # Tests without root run the files of one image below several roots, each with its own age.
    below_root = Path(host_path(f"{_DIRECTORY}/{name}"))
    return below_root if below_root.is_file() else Path(__file__).parent / name
