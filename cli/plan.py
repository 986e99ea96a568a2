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
    file: Path, image: str | None, *, format: str, host: str | None, facts: Path | None
) -> str:
    """Write the plan of a file in one of the formats; with `facts`, ask no host for it."""
    deployment = load(file, image)
    if host is not None and host not in deployment.hosts:
        message = f"expected one of the file's hosts ({', '.join(deployment.hosts)}), found {host}"
        raise InvalidInput([Problem("--host", message)])
    if facts and image == NEWEST:
        message = "expected an image by name with --facts, as no registry is asked; found newest"
        raise InvalidInput([Problem("--image", message)])
    made = (
        facts_file.make_plan(deployment, facts)
        if facts
        else _plan_on_hosts(
            load_deployment(file), image if image in (None, NEWEST) else deployment.image
        )
    )
    if format == "shell":
        placed = placement.build(deployment)
        names = [host] if host else list(deployment.hosts)
        return "\n".join(shell.script(deployment, placed, made, name) for name in names)
    text = made.model_dump_json(indent=2) if format == "json" else show.plan(made)
    return f"{text}\n"


def _plan_on_hosts(deployment: Deployment, image: str | None) -> Plan:
    from pd_deploy.cli import hosts

    return hosts.plan(deployment, image)
