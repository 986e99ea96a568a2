"""The strictness rules (rules.json) and the error that names them."""

import json
import os
from pathlib import Path

RULES = json.loads((Path(__file__).parent / "rules.json").read_text())


class Refusal(Exception):
    """The real engine would refuse this, or silently get it wrong.

    Args:
        rule: a key of "rules" in rules.json.
        detail: what was expected and what was found.
    """

    def __init__(self, rule: str, detail: str) -> None:
        entry = RULES["rules"][rule]
        super().__init__(
            f"standin: refused [{rule}, contract {entry['section']}]: {entry['text']}: {detail}"
        )
        self.rule = rule


def host_path(path: str) -> str:
    """Return an absolute path of the host or container; STANDIN_ROOT moves it, for tests."""
    return os.environ.get("STANDIN_ROOT", "") + path
