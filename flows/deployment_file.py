"""Which deployment file a run may read: its parameter comes from whoever may start runs."""

import os
from collections.abc import Collection
from pathlib import Path

from prefect.context import FlowRunContext

from pd_deploy.config.fields import archive_of, shown
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.flows.run import page

DIRECTORIES = "PD_DEPLOY_DIRECTORIES"
"""Set for a worker: further directories of deployment files, with `:` between them."""
_SUFFIXES = (".yaml", ".yml")


def load(file: str, *, image: str | None = None) -> Deployment:
    """Load the deployment that a run is to work on; see `load_deployment`.

    A run of a deployment of Prefect's reads deployment files and image archives in the
    worker's directory alone, or in those that the worker allows. `pd-deploy` at a prompt reads
    what its user may read.

    Raises:
        InvalidInput: the file is elsewhere, whether it exists or not, or has problems.
    """
    deployment = _load(file, image)
    if of_run := page.get(None):
        of_run.deployment = deployment.name
    return deployment


def _load(file: str, image: str | None) -> Deployment:
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run is None or flow_run.deployment_id is None:
        return load_deployment(Path(file), image=image)
    if not _is_allowed(file, _SUFFIXES):
        raise _elsewhere("file", "a deployment file (.yaml)", file)
    deployment = load_deployment(Path(file), image=image)
    archive = archive_of(deployment.image)
    if archive and not _is_allowed(archive):
        raise _elsewhere("image", "an image archive", archive)
    return deployment


def _elsewhere(key: str, expected: str, found: str) -> InvalidInput:
    message = f"expected {expected} in the worker's directory or below it, found {shown(found)}"
    return InvalidInput(
        [Problem(key, message)],
        hint=f"the environment variable {DIRECTORIES} of the worker allows further directories",
    )


def _is_allowed(file: str, suffixes: Collection[str] = ()) -> bool:
    """Tell whether a file is in a directory that is allowed, and ends in one of the suffixes."""
    directories = [Path.cwd(), *map(Path, filter(None, os.environ.get(DIRECTORIES, "").split(":")))]
    try:
        # Links count as what they lead to.
        path = Path(file).resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return (not suffixes or path.suffix in suffixes) and any(
        path.is_relative_to(directory.resolve()) for directory in directories
    )
