"""Planning a deployment, and writing the plan in one of its formats."""

from pathlib import Path

from pd_deploy.cli import facts_file, shell, show
from pd_deploy.cli.check import load
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.planning import placement
from pd_deploy.planning.plans import Plan
from pd_deploy.registry.tags import NEWEST


def text_of(
    file: Path,
    image: str | None,
    *,
    format: str,
    full: bool,
    host: str | None,
    facts: Path | None,
) -> str:
    """Write the plan of a file in one of the formats; with `facts`, ask no host for it.

    Args:
        full: with the format `text`, write all that is made as well.
    """
    deployment = load(file, image)
    if host is not None and host not in deployment.hosts:
        message = f"expected one of the file's hosts ({', '.join(deployment.hosts)}), found {host}"
        raise InvalidInput([Problem("--host", message)])
    if facts and image == NEWEST:
        message = "expected an image by name with --facts, as no registry is asked; found newest"
        raise InvalidInput([Problem("--image", message)])
    made, said = (
        (facts_file.make_plan(deployment, facts), "")
        if facts
        else _plan_on_hosts(
            load_deployment(file), image if image in (None, NEWEST) else deployment.image
        )
    )
    if format == "shell":
        placed = placement.build(deployment)
        names = [host] if host else list(deployment.hosts)
        return "\n".join(shell.script(deployment, placed, made, name) for name in names)
    if format == "json":
        return f"{made.model_dump_json(indent=2)}\n"
    if full:
        return f"{show.plan(made, said)}\n"
    return f"{show.short_plan(made, said)}\n\n{_next(file)}\n"


def _next(file: Path) -> str:
    return (
        f"`pd-deploy plan {file} --full` prints containers, commands and files, "
        f"`pd-deploy diff {file}` what differs from what serves. Next: pd-deploy deploy {file}"
    )


def _plan_on_hosts(deployment: Deployment, image: str | None) -> tuple[Plan, str]:
    from pd_deploy.cli import hosts

    return hosts.plan(deployment, image)
