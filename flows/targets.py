"""The file from which Prometheus takes its targets, where the machine of a run has a place for it.

A run that ends well leaves there what serves now. Where Prometheus runs elsewhere, `pd-deploy
metrics` writes the same file.
"""

import contextlib
import os
from pathlib import Path

from pd_deploy.planning import scraping
from pd_deploy.steps.rollout import Rollout

DIRECTORY = "PD_DEPLOY_METRICS"
"""Name of the environment variable with a directory of `file_sd_configs`."""
READABLE = 0o644  # Prometheus runs as another user


def refresh(rollout: Rollout) -> str:
    """Write the targets of the generation that serves now; return why they could not be."""
    deployment, topology = rollout.session.deployment, rollout.session.topology
    groups = scraping.groups(deployment, topology, rollout.plan.generation)
    return _told(deployment.name, scraping.text(groups))


def remove(deployment: str) -> str:
    """Remove the targets of a deployment that is gone; return why they could not be."""
    return _told(deployment, None)


def _told(deployment: str, content: str | None) -> str:
    directory = os.environ.get(DIRECTORY)
    if not directory:
        return ""
    path = Path(directory) / f"{deployment}.json"
    try:
        if content is None:
            path.unlink(missing_ok=True)
        else:
            replace(path, content)
    except OSError as error:
        return f"{path} of {DIRECTORY} cannot be written: {error.strerror}"
    return ""


def replace(path: Path, content: str) -> None:
    """Replace a file at once: whoever reads it meanwhile gets the old content or the new.

    The draft's name does not end in `.json`, so `file_sd_configs` with `*.json` passes it over.

    Raises:
        OSError: it can't be written; a file that was there stays as it was.
    """
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(content)
        draft.chmod(READABLE)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
