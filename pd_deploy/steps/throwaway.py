"""Containers that say something of their image and are gone afterwards: no device, no network."""

import asyncio
import logging
from collections.abc import Sequence

from pd_deploy.errors import PdDeployError
from pd_deploy.hosts.container_values import ContainerSpec, Mount
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.settled import settled
from pd_deploy.records import generations
from pd_deploy.steps.session import Session

log = logging.getLogger(__name__)


async def output(
    session: Session,
    host: Host,
    image: str,
    command: Sequence[str],
    seconds: float,
    *,
    name: str,
    mounts: Sequence[Mount] = (),
) -> tuple[str, int]:
    """Return what a command prints in a container of an image, and its exit code.

    Raises:
        TimeoutError: it does not end in so many seconds.
    """
    deployment = session.deployment.name
    spec = ContainerSpec(
        name=name,
        image=image,
        entrypoint=(),
        command=tuple(command),
        mounts=tuple(mounts),
        network_mode="none",
        user="root",
        labels={generations.DEPLOYMENT: deployment, generations.ROLE: generations.PROBE},
    )
    await session.may_change(host)
    # One of a run that was killed.
    await host.docker.remove(name, deployment=deployment, force=True)
    try:
        await session.may_change(host)
        await host.docker.create(spec)
        await session.may_change(host)
        await host.docker.start(name)
        async with asyncio.timeout(seconds):
            code = await host.docker.wait(name)
        return await host.docker.logs(name, "all"), code
    finally:
        await settled(_gone(host, name, deployment))


def name_of(session: Session) -> str:
    """Return the name of a run's own such container; it has one at a time on each host."""
    return f"pd-deploy-probe_{session.deployment.name}"


async def _gone(host: Host, name: str, deployment: str) -> None:
    try:
        await host.docker.remove(name, deployment=deployment, force=True)
    except PdDeployError as fault:
        log.warning("the next run that asks an image there removes %s: %s", name, fault)
