"""What serves where, of many deployments."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pd_deploy.cli.tables import aligned
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, PdDeployError, Problem
from pd_deploy.records.status import Status, Verdict

SUFFIXES = (".yaml", ".yml")
PREFECT_FILE = "prefect.yaml"


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
    from pd_deploy.cli import hosts

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
            "; ".join(filter(None, (_state(row), row.remark))),
        )
        for row in rows
    ]
    return "\n".join(aligned([("deployment", "generation", "image", "since", "state"), *cells]))


def _state(row: Status) -> str:
    is_told = row.verdict in (None, Verdict.SERVING)
    return row.state if is_told else f"{row.verdict}: {row.state}"


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
