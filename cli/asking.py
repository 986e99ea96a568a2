"""What all commands do that ask hosts: say what is wrong with the Prefect server that has their
credentials, and connect early."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

from pd_deploy.blocks import server
from pd_deploy.blocks.opening import names_blocks
from pd_deploy.config.models import Deployment
from pd_deploy.hosts.host import Hosts


@contextmanager
def asking(deployments: Iterable[Deployment]) -> Iterator[None]:
    """Turn errors of the Prefect server into ours, where deployments have credentials there.

    Prefect, which takes a second to load, is not loaded for it.
    """
    if not any(map(names_blocks, deployments)):
        yield
        return
    server.spare_the_proxy(server.url(server.settings()))
    try:
        yield
    except Exception:
        if "prefect" not in sys.modules:
            raise
        from pd_deploy.cli.prefect_api import reached

        with reached():
            raise


@asynccontextmanager
async def connecting(hosts: Hosts) -> AsyncIterator[None]:
    """Begin to connect to all hosts; whoever asks them later waits for the rest, or is told why
    there is no way to them."""
    begun = [asyncio.ensure_future(host.connect()) for host in hosts.values()]
    try:
        yield
    finally:
        for connection in begun:
            connection.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
