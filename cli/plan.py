"""Planning a deployment, and writing the plan in one of its formats."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pd_deploy.cli import facts_file, shell, show
from pd_deploy.cli.check import load
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.planning import placement
from pd_deploy.planning.plans import Plan
from pd_deploy.registry.tags import NEWEST

NOT_ASKED: Mapping[str, object] = {"contract": None, "image_facts": {}}


@dataclass(frozen=True)
class Written:
    """A plan in one of its formats.

    Attributes:
        text: what goes to standard output.
        away: what to tell beside it of hosts that don't answer.
        complete: whether all hosts answered.
    """

    text: str
    away: tuple[str, ...] = ()
    complete: bool = True


def written(
    file: Path,
    image: str | None,
    *,
    format: str,
    full: bool,
    host: str | None,
    facts: Path | None,
) -> Written:
    """Write the plan of a file in one of the formats; with `facts`, ask no host for it.

    Args:
        full: with the format `text`, write all that is made as well.

    Raises:
        HostUnreachable: no host answers, or too few for a format that programs read.
    """
    deployment = load(file, image)
    if host is not None and host not in deployment.hosts:
        message = f"expected one of the file's hosts ({', '.join(deployment.hosts)}), found {host}"
        raise InvalidInput([Problem("--host", message)])
    if facts:
        if image == NEWEST:
            message = (
                "expected an image by name with --facts, as no registry is asked; found newest"
            )
            raise InvalidInput([Problem("--image", message)])
        made = facts_file.make_plan(deployment, facts)
        if format == "text":
            then = _then(file, complete=True, held=False)
            return Written(_text(file, show.plan(made, full=full), then, full=full))
        return Written(_for_programs(deployment, made, format, host, NOT_ASKED))
    return _on_hosts(file, deployment, image, format=format, full=full, host=host)


def _on_hosts(
    file: Path,
    deployment: Deployment,
    image: str | None,
    *,
    format: str,
    full: bool,
    host: str | None,
) -> Written:
    from pd_deploy.cli import planned

    requested = image if image in (None, NEWEST) else deployment.image
    look = planned.of(load_deployment(file), requested)
    complete = not look.away
    if format == "text":
        shown = planned.text(deployment.name, look, full=full)
        if hold := look.history.record.hold:
            shown += f"\n\nno run would do it now: held by {hold}"
        then = _then(file, complete=complete, held=hold is not None)
        return Written(_text(file, shown, then, full=full), complete=complete)
    # Scripts are for all hosts at the same time, and of what hosts say now.
    made = look.require_plan(of_all=format == "shell")
    away = () if complete else (look.reservation, *look.rows)
    written = _for_programs(deployment, made, format, host, look.known_of_image)
    return Written(written, away, complete)


def _for_programs(
    deployment: Deployment,
    made: Plan,
    format: str,
    host: str | None,
    known_of_image: Mapping[str, object],
) -> str:
    if format == "json":
        return f"{json.dumps({**made.model_dump(mode='json'), **known_of_image}, indent=2)}\n"
    placed = placement.build(deployment)
    names = [host] if host else list(made.hosts)
    return "\n".join(shell.script(deployment, placed, made, name) for name in names)


def _text(file: Path, shown: str, then: str, *, full: bool) -> str:
    if full:
        return f"{shown}\n"
    return (
        f"{shown}\n\n`pd-deploy plan {file} --full` prints containers, commands and files, "
        f"`pd-deploy diff {file}` what differs from what serves. Next: pd-deploy {then}\n"
    )


def _then(file: Path, *, complete: bool, held: bool) -> str:
    """Name what comes after a plan: a run refuses to begin before all hosts answer, and while the
    deployment is held."""
    if not complete:
        return f"status {file} (until all hosts answer)"
    return f"lock release {file}" if held else f"deploy {file}"
