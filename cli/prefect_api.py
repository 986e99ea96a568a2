"""Talking to the Prefect server: turn the client's errors into our own."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer
from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from pd_deploy.errors import PdDeployError


class ServerLost(PdDeployError):
    """The Prefect server can't be reached."""


@contextmanager
def reached() -> Iterator[None]:
    """Turn the client's errors into one of ours: no server, or a server without the object.

    Raises:
        PdDeployError: the server does not have what was asked for.
        ServerLost: the server can't be reached.
    """
    try:
        yield
    except ObjectNotFound as error:
        raise PdDeployError(
            f"expected a flow run of that id at {get_current_settings().api.url}, found none",
            hint="`prefect flow-run ls` lists the ids",
        ) from error
    except (httpx.TransportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise ServerLost(
            f"expected a Prefect server at {get_current_settings().api.url}, found none",
            hint="run `prefect server start`, or unset PREFECT_API_URL for a temporary one",
        ) from error


def save(block: Block, name: str) -> None:
    """Save a block under a name, and print that it was saved."""
    with reached():
        block.save(name, overwrite=True)
    typer.echo(f"saved {block.get_block_type_slug()}/{name}")
