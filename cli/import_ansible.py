"""`pd-deploy import-ansible`: make a deployment file of an Ansible inventory and its playbook."""

import re
from pathlib import Path
from typing import NamedTuple

from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.importer import importing
from pd_deploy.importer import report as reports
from pd_deploy.importer.source import Answers

_NOT_IMPORTED = "nothing was written: correct what is listed under `problem`"


class Outcome(NamedTuple):
    """The deployment file's text, if there is one, the report's, and whether all went well."""

    text: str | None
    report: str
    is_accepted: bool


def run(
    inventory: Path,
    template: Path | None,
    *,
    output: Path | None,
    name: str | None,
    settings: list[str],
    profile: str | None,
    compat: bool,
    strict: bool,
) -> Outcome:
    """Import the files; `strict` accepts no warnings.

    Raises:
        InvalidInput: a file can't be read at all, or an option is wrong.
    """
    answers = _answers(settings)
    result = importing.run(
        inventory,
        template,
        name=name or _name(output or template or inventory),
        answers=answers,
        profile=profile,
        compat=compat,
    )
    unused = [key for key in answers.values if key not in answers.used]
    if unused:
        message = f"expected names that the files ask for, found {', '.join(unused)}"
        raise InvalidInput([Problem("--set", message)])
    warned = strict and bool(result.report.of(*reports.WARNINGS))
    accepted = result.text is not None and not warned
    text = reports.written(result.report)
    if not accepted:
        text += f"\n{_NOT_IMPORTED if result.text is None else _strict()}\n"
    return Outcome(result.text if accepted else None, text, accepted)


def _strict() -> str:
    return f"nothing was written: with --strict, no line may be {', '.join(reports.WARNINGS)}"


def write(path: Path, text: str, *, force: bool) -> None:
    """Write a file that does not exist yet, or replace it with `force`.

    Raises:
        InvalidInput: it exists already, or can't be written.
    """
    try:
        with path.open("w" if force else "x") as file:
            file.write(text)
    except FileExistsError as error:
        message = "exists already and was not changed; choose another, or give --force"
        raise InvalidInput([Problem(str(path), message)]) from error
    except OSError as error:
        message = f"cannot be written: {error.strerror}"
        raise InvalidInput([Problem(str(path), message)]) from error


def refuse_existing(paths: list[Path], *, force: bool) -> None:
    """Refuse to replace files, before any work.

    Raises:
        InvalidInput: one exists, and `force` is not given.
    """
    taken = [path for path in paths if path.exists() or path.is_symlink()]
    if taken and not force:
        message = "exists already and was not changed; choose another, or give --force"
        raise InvalidInput([Problem(str(path), message) for path in taken])


def _answers(settings: list[str]) -> Answers:
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise InvalidInput([Problem("--set", f"expected NAME=VALUE, found {name}")])
        values[name] = value
    return Answers(values)


def _name(path: Path) -> str:
    """Make a deployment's name of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:40].strip("-") or "service"
