"""`pd-deploy fleet`: many deployments at once."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from pd_deploy.cli import show
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, PdDeployError, Problem
from pd_deploy.records.status import Status

SUFFIXES = (".yaml", ".yml")
PREFECT_FILE = "prefect.yaml"
DOES_NOT_SERVE = 1  # exit code: something does not serve, or was not reached

app = typer.Typer(
    help="Look at many deployments at once.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def options() -> None:
    """Make `status` a command of its own, though it is the only one."""


@app.command()
def status(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES|DIRS]",
            help="Deployment files, and directories with some; by default, this directory.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Print which generation of which image serves, of each deployment.

    All hosts are asked at once, and nothing is changed. A host that does not answer, and a file
    that is invalid, are told in their row. The exit code is 0 if every deployment serves, else 1.

    Example: pd-deploy fleet status deployments/
    """
    rows = statuses(files_of(paths or [Path()]))
    typer.echo(as_documents(rows) if as_json else table(rows))
    raise typer.Exit(0 if all(row.serves for row in rows) else DOES_NOT_SERVE)


def files_of(paths: Iterable[Path]) -> list[Path]:
    """List the deployment files that paths name: a directory stands for those in it.

    Raises:
        InvalidInput: paths that do not exist, or that no deployment file is in.
    """
    files: dict[Path, None] = {}
    problems = []
    for path in paths:
        inside = list(_inside(path))
        if not inside:
            what = "a directory without any" if path.is_dir() else "nothing there"
            message = f"expected a deployment file, or a directory of some; found {what}"
            problems.append(Problem(str(path), message))
        files |= dict.fromkeys(inside)
    if problems:
        raise InvalidInput(problems)
    return list(files)


def statuses(files: Sequence[Path]) -> list[Status]:
    """Ask the hosts of all files; say in place of an answer why there is none."""
    from pd_deploy.cli import hosts  # noqa: PLC0415  Prefect takes seconds to import

    loaded = {file: _loaded(file) for file in files}
    deployments = {file: d for file, d in loaded.items() if isinstance(d, Deployment)}
    answers = hosts.read_statuses(deployments.values())
    by_file: dict[Path, Status | PdDeployError] = dict(zip(deployments, answers, strict=True))
    by_file |= {file: d for file, d in loaded.items() if not isinstance(d, Deployment)}
    return [_row(file, by_file[file]) for file in files]


def table(rows: Iterable[Status]) -> str:
    """Align the statuses in columns."""
    cells = [
        (
            row.deployment,
            row.generation,
            row.image.rpartition("/")[2],
            f"{row.since:%Y-%m-%d %H:%M:%S}" if row.since else "",
            "; ".join(filter(None, (row.state, row.remark))),
        )
        for row in rows
    ]
    return "\n".join(show.table([("deployment", "generation", "image", "since", "state"), *cells]))


def as_documents(rows: Iterable[Status]) -> str:
    """Format the statuses for programs."""
    documents = [dataclasses.asdict(row) | {"serves": row.serves} for row in rows]
    return json.dumps(documents, indent=2, default=str)


def _inside(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        for file in sorted(path.iterdir()):
            if file.suffix in SUFFIXES and file.name != PREFECT_FILE and file.is_file():
                yield file


def _loaded(file: Path) -> Deployment | PdDeployError:
    try:
        return load_deployment(file)
    except PdDeployError as error:
        return error


def _row(file: Path, answer: Status | PdDeployError) -> Status:
    if isinstance(answer, Status):
        return answer
    problems = answer.problems if isinstance(answer, InvalidInput) else [answer]
    return Status(file.stem, state="; ".join(f"{file}: {problem}" for problem in problems))
