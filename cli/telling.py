"""What commands tell of faults, on standard error: hints such as `pd-deploy status FILE` name the
file that the command was given."""

import re
import shlex
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer

_given: ContextVar[Path | None] = ContextVar("given", default=None)


def remember(file: Path) -> Path:
    """Note the file that the command is about."""
    _given.set(file)
    return file


File = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="The deployment file (YAML).", callback=remember),
]


def named(told: object) -> str:
    """Put the command's file where commands in a text have FILE; code in it has them in
    backticks."""
    file, text = _given.get(), str(told)
    if file is None:
        return text
    name = shlex.quote(str(file))
    return re.sub(
        r"`pd-deploy [^`\n]*`",
        lambda command: re.sub(r"\bFILE\b", lambda _: name, command[0]),
        text,
    )


def tell(fault: object) -> None:
    """Print what is wrong."""
    typer.echo(f"pd-deploy: {named(fault)}", err=True)
