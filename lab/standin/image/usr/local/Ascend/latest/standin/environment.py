"""The engine's environment as its contract has it (4.1), checked."""

import os
import socket
from collections.abc import Mapping

from standin import age
from standin.rules import Refusal


class Environment:
    """The checked variables: `env["ROLE"]` is text, `env.number("VLLM_DP_SIZE")` an integer."""

    def __init__(self, source: Mapping[str, str] = os.environ) -> None:
        self._values = {
            name: _checked(spec.get("names", [name]), source, spec)
            for name, spec in age.table("env").items()
        }
        self.instance = source.get("HOST", "")
        # Name → the one that was meant, and is not there.
        self.unread = {
            name: meant
            for name, meant in age.table("unread_env").items()
            if name in source and meant not in source
        }

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def number(self, name: str) -> int:
        """Return the value of an integer variable."""
        return int(self._values[name])

    def switch(self, name: str) -> bool:
        """Tell whether a 0/1 variable is on; one that this contract does not read is off."""
        return self._values.get(name) == "1"


def _checked(names: list[str], source: Mapping[str, str], spec: dict) -> str:
    """Check the first of these variables that is set."""
    # Trailing blanks are legal: upstream's multi-node RANK_TABLE_FILE_PATH has one (4.1).
    given = [(name, value) for name in names if (value := source.get(name, "").strip())]
    name, value = given[0] if given else (" or ".join(names), spec.get("default"))
    if value is None:
        raise Refusal("env-missing", f"{name} ({spec['section']}) is not set")
    if "one_of" in spec and value not in spec["one_of"]:
        expected = " or ".join(spec["one_of"])
        raise Refusal("env-value", f"{name} ({spec['section']}) must be {expected}, found {value!r}")
    if spec.get("type") == "int" and not value.isdecimal():
        raise Refusal("env-value", f"{name} ({spec['section']}) must be an integer, found {value!r}")
    if spec.get("type") == "interface" and value:
        _check_interface(name, value)
    return value


def _check_interface(name: str, value: str) -> None:
    known = [interface for _, interface in socket.if_nameindex()]
    if value not in known:
        raise Refusal("interface", f"{name}={value}, this host has {', '.join(known)}")
