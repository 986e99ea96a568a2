"""Checking a deployment file, without any host."""

from pathlib import Path

from pd_deploy.cli.tables import aligned
from pd_deploy.code import reading
from pd_deploy.config.load import load_deployment, naming_lines
from pd_deploy.config.models import Deployment
from pd_deploy.planning import placement
from pd_deploy.registry import tags
from pd_deploy.registry.tags import NEWEST


def load(file: Path, image: str | None = None) -> Deployment:
    """Load a file's deployment; check its values, and the topology that they make.

    Which image is the newest only the registry knows: for that, check the file's policy.
    """
    named = None if image == NEWEST else image
    deployment = load_deployment(file, image=named)
    with naming_lines(file, image=named):
        if image == NEWEST:
            tags.policy_of(deployment)
        placement.build(deployment)
    return deployment


def describe(deployment: Deployment) -> str:
    """Describe a deployment by a table of its instances."""
    placed = placement.build(deployment)
    rows = [("instance", "role", "host", "address", "devices", "master", "zmq")]
    rows += [
        (
            i.name,
            i.role,
            i.host,
            i.server,
            i.device_list,
            str(i.master_port),
            str(i.zmq_port),
        )
        for i in placed.instances
    ]
    rows += [(p.name, "proxy", p.host, p.server, "", "", "") for p in placed.proxies]
    return "\n".join(
        [
            f"{deployment.name}: {len(placed.prefill)} prefill + {len(placed.decode)} decode, "
            f"{deployment.engine}, profile {deployment.profile}",
            f"image {deployment.image_reference}",
            *_own_code(deployment),
            *_unusual(deployment),
            "",
            *aligned(rows),
        ]
    )


def _own_code(deployment: Deployment) -> list[str]:
    own = deployment.own_code
    return [f"code {own.source}: {reading.read(own.source, own.patches).detail}"] if own else []


def _unusual(deployment: Deployment) -> list[str]:
    lines = [_upstream(deployment)] if deployment.compat else []
    if deployment.allow:
        lines.append(f"allowed to break the rules {', '.join(dict.fromkeys(deployment.allow))}")
    return lines


def _upstream(deployment: Deployment) -> str:
    """Say which upstream files the values follow, as the profile says."""
    if deployment.upstream_source:
        return f"values as upstream has them in {deployment.upstream_source}"
    section = f"values from the section `upstream` of profile {deployment.profile}"
    return f"{section}, which does not say where upstream has them"
