"""Misbehaviour on request: defaults < /etc/standin.json < /data/standin/<HOST>.json."""

import json
from pathlib import Path
from typing import Any

from standin.rules import Refusal, host_path

# By name, with the values without a fault; the README says what each does.
DEFAULTS: dict[str, Any] = json.loads((Path(__file__).parent / "faults.json").read_text())


class Faults:
    """The faults of one instance; the files are read again at each call of `now`."""

    def __init__(self, instance: str) -> None:
        self._files = [Path(host_path("/etc/standin.json"))]
        if instance:
            self._files.append(Path(host_path(f"/data/standin/{instance}.json")))
        self._last = self._read()

    def now(self) -> dict[str, Any]:
        """Return the settings in force; after reading a half-written file, the last good ones."""
        try:
            self._last = self._read()
        except Refusal as refusal:
            print(f"WARNING {refusal}", flush=True)
        return self._last

    def _read(self) -> dict[str, Any]:
        settings = dict(DEFAULTS)
        for file in self._files:
            if file.is_file():
                settings |= _load(file)
        return settings


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Refusal("faults", f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise Refusal("faults", f"{file}: must be an object")
    unknown = sorted(content.keys() - DEFAULTS)
    if unknown:
        raise Refusal("faults", f"{file}: expected some of {sorted(DEFAULTS)}, found {unknown}")
    return content
