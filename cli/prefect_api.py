"""What can go wrong between the command and the Prefect server, as errors of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer
from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from pd_deploy.errors import PdDeployError


class ServerLost(PdDeployError):
    """There is no Prefect server, or none any more."""


@contextmanager
def reached() -> Iterator[None]:
    """Turns a server that is not there, or does not know what it is asked for, into one error.

    Raises:
        PdDeployError, ServerLost: instead of the client's own errors.
    """
    try:
        yield
    except ObjectNotFound as error:
        raise PdDeployError(
            f"the Prefect server at {get_current_settings().api.url} does not know it",
            hint="look for its id with `prefect flow-run ls`",
        ) from error
    except (httpx.TransportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise ServerLost(
            f"expected a Prefect server at {get_current_settings().api.url}, found none",
            hint="run `prefect server start`, or unset PREFECT_API_URL for a temporary one",
        ) from error


def save(block: Block, name: str) -> None:
    """Saves a block under a name, and says so."""
    with reached():
        block.save(name, overwrite=True)
    typer.echo(f"saved {block.get_block_type_slug()}/{name}")
