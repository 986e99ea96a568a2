"""The options of `python3 -m sglang.launch_server`, by a table of what the real parser has.

The table is that of 0.5.23: names, kinds, numbers of values, types and choices.
"""

import argparse
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("options.json")
UNITS = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}


def number(text: str) -> int:
    """Read a number that may have a unit, as `4k`."""
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1:] in UNITS else int(text)


def json_value(text: str) -> str:
    """Check that a value is JSON; keep it as it is."""
    json.loads(text)
    return text


TYPES: dict[str, Any] = {"int": int, "float": float, "number": number, "json": json_value}


def parser() -> argparse.ArgumentParser:
    """Make the parser; like the real one, it takes unambiguous beginnings of names."""
    made = argparse.ArgumentParser(prog="launch_server.py")
    for row in json.loads(TABLE.read_text()):
        names = row["names"]
        if row["kind"] == "switch":
            made.add_argument(*names, action="store_true")
        elif row["kind"] == "yes-no":
            made.add_argument(*names, action=argparse.BooleanOptionalAction)
        else:
            made.add_argument(
                *names,
                nargs=row.get("nargs"),
                type=TYPES.get(row.get("type", ""), str),
                choices=row.get("choices"),
                required="--model-path" in names,
            )
    return made
