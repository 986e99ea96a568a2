"""Checking hosts in full, and the table of what is wrong."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict

import typer

from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import hosts
from pd_deploy.cli.tables import aligned
from pd_deploy.config.fields import archive_of
from pd_deploy.config.models import Deployment
from pd_deploy.errors import PdDeployError
from pd_deploy.planning import peers, placement
from pd_deploy.planning.flaws import Flaw
from pd_deploy.planning.host_facts import facts_of
from pd_deploy.steps import full_preflight
from pd_deploy.steps.full_preflight import Findings

EPHEMERAL = range(32768, 61000)
"""Ports that Linux gives to outbound connections, unless it is told otherwise."""


def run(deployment: Deployment, image: str | None, *, full_hashes: bool) -> Findings:
    """Check the hosts of a deployment, outside of any flow run."""
    from pd_deploy.flows import preflight

    async def check() -> Findings:
        async with open_session(deployment) as session:
            return await preflight.find_flaws(session, image, "a look", full_hashes, _tell)

    with hosts.asking([deployment]):
        return asyncio.run(check())


def offline(deployment: Deployment) -> Findings:
    """Check what can be known without any host; the file itself is valid already."""
    from pd_deploy.registry import archives

    found = []
    topology = placement.derive(deployment)
    for name, entry in deployment.hosts.items():
        risky = [port for port in peers.ports(topology, name) if port in EPHEMERAL]
        if risky:
            found.append(
                Flaw(
                    "host", f"{name} ({entry.address})",
                    "expected ports outside of the kernel's usual ephemeral range, "
                    f"found {', '.join(map(str, risky))}",
                    "reserve them there (sysctl net.ipv4.ip_local_reserved_ports), or move them",
                    is_error=False,
                )
            )  # fmt: skip
    if archive := archive_of(deployment.image):
        try:
            asyncio.run(archives.read(archive))
        except PdDeployError as error:
            found.append(full_preflight.flaw_of(error))
    return Findings(found)


def as_json(deployment: Deployment, found: Findings) -> str:
    """Format problems, and what hosts said, for programs."""
    document = {
        "deployment": deployment.name,
        "problems": [*map(asdict, found.flaws)],
        "hosts": {answers.name: facts_of(answers) for answers in found.answers},
    }
    return json.dumps(document, indent=2)


def as_text(deployment: Deployment, found: Findings, what: str) -> str:
    """Format what hosts said, and problems, as tables for people, with a line that counts them."""
    said = [
        (a.where, "; ".join(f"{name} {value}" for name, value in facts_of(a).items()))
        for a in found.answers
    ]
    problems = [
        ("error" if f.is_error else "warning", f.check, f.host, _line(f"{f.message} → {f.hint}"))
        for f in found.flaws
    ]
    lines = [*aligned([("host", "found"), *said]), ""] if said else []
    if problems:
        lines += [*aligned([("", "check", "host", "problem → what to do"), *problems]), ""]
    return "\n".join([*lines, f"{deployment.name}: {summary(found.flaws)} ({what})"])


def _tell(progress: str) -> None:
    typer.echo(progress, err=True)


def summary(found: Sequence[Flaw]) -> str:
    """Count errors and warnings."""
    errors = sum(flaw.is_error for flaw in found)
    warnings = len(found) - errors
    counts = [f"{errors} error{'s' * (errors != 1)}"] * bool(errors)
    counts += [f"{warnings} warning{'s' * (warnings != 1)}"] * bool(warnings)
    return ", ".join(counts) or "no problems"


def _line(text: str) -> str:
    return " ".join(text.split())
