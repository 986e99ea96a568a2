"""The command line of `vllm serve`, as far as the contract knows it (4.3)."""

import argparse
import json
from typing import Any

from standin import age


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse `serve MODEL --flag …`; an unknown flag or a wrong type exits with code 2."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", allow_abbrev=False)
    serve.add_argument("model")
    for flag, spec in age.table("vllm_flags").items():
        if spec["type"] == "flag":
            serve.add_argument(flag, action="store_true")
        else:
            serve.add_argument(flag, type=_TYPES[spec["type"]], default=spec["default"])
    return parser.parse_args([_dashed(argument) for argument in argv])


def _dashed(argument: str) -> str:
    # vLLM accepts --block_size for --block-size; only the flag's name is touched, not its value.
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None


_TYPES = {"int": int, "float": float, "str": str, "json": _json}
