"""Misbehaviour on request: defaults < /etc/standin.json < /data/standin/<HOST>.json."""

import json
from pathlib import Path
from typing import Any

from standin.rules import Refusal, host_path

DEFAULTS: dict[str, Any] = {
    "load_seconds": 0.5,  # time to load the weights
    "crash_after": None,  # seconds after the start until it dies with a traceback
    "exit_code": 1,  # of such a death
    "hang": False,  # loads, but never links
    "unhealthy": False,  # /health answers 500
    "garbage": False,  # completions answer 200 with text that is no completion
    "error_status": None,  # completions answer this HTTP status
    "slow": 0.0,  # seconds added to every completion
    "token_seconds": 0.0,  # seconds per generated token
    "refuse_kv": False,  # prefill: does not hand its KV over
    "ignore_kv": False,  # decode: computes the prompt itself although KV was offered
    "other_heads": False,  # decode: reads other heads' KV than those of its prompt
    "keep_kv": False,  # prefill: does not free blocks when told to
    "crash_on_request": False,  # dies at the next completion
}


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
