"""This image's age: upstream changed some meanings at known dates."""

from datetime import date
from pathlib import Path

from standin.rules import RULES, Refusal, host_path

_BESIDE = Path(__file__).parent / "built"  # an image variant holds another date there


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
    # Tests without root run the files of one image below several roots, each with its own date.
    below_root = Path(host_path("/usr/local/Ascend/latest/standin/built"))
    file = below_root if below_root.is_file() else _BESIDE
    try:
        return date.fromisoformat(file.read_text().strip())
    except (OSError, ValueError) as error:
        raise Refusal("built", f"{file}: {error}") from None
