"""`pd-deploy import-ansible`: make a deployment file of an Ansible inventory and its playbook."""

import re
from pathlib import Path
from typing import NamedTuple

from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.importer import importing
from pd_deploy.importer import report as reports
from pd_deploy.importer.source import Answers


class Outcome(NamedTuple):
    """Texts: the deployment file, unless it is refused, the report, and what to say at the end."""

    text: str | None
    report: str
    summary: str


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
    listed = result.report
    warned = strict and bool(listed.of(*reports.WARNINGS))
    text = None if warned else result.text
    if result.text is None:
        summary = (
            f"{reports.listed(listed, 'problem')}\n"
            "Nothing was written: answer or correct these, and run it again."
        )
    elif warned:
        summary = (
            f"Nothing was written: with --strict, no line may be one of "
            f"{', '.join(reports.WARNINGS)}."
        )
    else:
        summary = f"To look at: {reports.counted(listed, reports.WARNINGS)}"
    return Outcome(text, reports.written(listed), summary)


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
