"""Deploying again whenever the deployment file or its source tree changes.

Both are looked at every second, as git lists the tree: no event is lost while a run is under way,
and file systems that send none, such as those of other machines, do as well.
"""

import time
from collections.abc import Callable
from pathlib import Path

import typer

from pd_deploy.cli.exit_codes import INTERRUPTED
from pd_deploy.cli.telling import tell
from pd_deploy.code import reading
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import InvalidInput

POLL_S = 1.0
SIGNALLED = 128  # exit codes from here on say that a signal ended the run


def deploy_on_change(file: Path, deploy: Callable[[], int]) -> int:
    """Deploy, and again after each change, until Ctrl-C; return the exit code.

    What changes during a run is deployed by one more run after it. A run that fails, or a file
    that is invalid, waits for the next change.
    """
    try:
        while True:
            before = _stamp(file)
            if _deployed(deploy) >= SIGNALLED:
                return INTERRUPTED
            typer.echo(f"Watching {file} and its source code; Ctrl-C ends that, and nothing else.")
            _until_changed(file, before)
            typer.echo("Changed: deploying again.")
    except KeyboardInterrupt:
        typer.echo("Watching has ended; the service is as the last run left it.")
        return 0


def _deployed(deploy: Callable[[], int]) -> int:
    try:
        return deploy()
    except InvalidInput as error:
        tell(error)
        return 0


def _until_changed(file: Path, before: object) -> None:
    """Wait until something differs, and for a second does not differ any more."""
    while (found := _stamp(file)) == before:
        time.sleep(POLL_S)
    while True:
        time.sleep(POLL_S)
        last, found = found, _stamp(file)
        if found == last:
            return


def _stamp(file: Path) -> object:
    """Return what stays the same as long as nothing changes that a run would read."""
    try:
        deployment = load_deployment(file)
        own = deployment.own_code
        return deployment, reading.stamp(own.source) if own else ()
    except InvalidInput as error:
        return str(error)
