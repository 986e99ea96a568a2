"""Which deployment file a run may read: its parameter comes from whoever may start runs."""

import os
from pathlib import Path

from prefect.context import FlowRunContext

from pd_deploy.config.fields import shown
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem

DIRECTORIES = "PD_DEPLOY_DIRECTORIES"
"""Set for a worker: further directories of deployment files, with `:` between them."""
_SUFFIXES = (".yaml", ".yml")


def load(file: str, *, image: str | None = None) -> Deployment:
    """Load the deployment that a run is to work on; see `load_deployment`.

    A run of a deployment of Prefect's reads deployment files in the worker's directory alone, or in
    those that the worker allows. `pd-deploy` at a prompt reads what its user may read.

    Raises:
        InvalidInput: the file is elsewhere, whether it exists or not, or has problems.
    """
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run and flow_run.deployment_id and not _is_allowed(file):
        raise InvalidInput(
            [
                Problem(
                    "file",
                    "expected a deployment file (.yaml) in the worker's directory or below it, "
                    f"found {shown(file)}",
                )
            ],
            hint=f"the environment variable {DIRECTORIES} of the worker allows further directories",
        )
    return load_deployment(Path(file), image=image)


def _is_allowed(file: str) -> bool:
    directories = [Path.cwd(), *map(Path, filter(None, os.environ.get(DIRECTORIES, "").split(":")))]
    try:
        # Links count as what they lead to.
        path = Path(file).resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return path.suffix in _SUFFIXES and any(
        path.is_relative_to(directory.resolve()) for directory in directories
    )
