"""`pd-deploy exec`: a command in an instance's container."""

import asyncio
import sys
from collections.abc import Callable, Sequence

from pd_deploy.cli.hosts import asking, connected
from pd_deploy.config.models import Deployment
from pd_deploy.errors import ContainerMissing
from pd_deploy.hosts.container_values import Owner
from pd_deploy.records import generations
from pd_deploy.records.adopted import AdoptedService
from pd_deploy.steps import logs
from pd_deploy.steps.session import Session


def run(deployment: Deployment, instance: str, argv: Sequence[str]) -> int:
    """Run a command in an instance's container, printing what it prints; return its exit code."""
    with asking([deployment]):
        return asyncio.run(executed(deployment, instance, argv, _print))


async def executed(
    deployment: Deployment,
    instance: str,
    argv: Sequence[str],
    write: Callable[[bytes, bytes], object],
) -> int:
    """Run a command in an instance's running container, or an adopted one that still serves in its
    place; return its exit code.

    Raises:
        InvalidInput: there is no such instance.
        ContainerMissing: it does not run.
    """
    async with connected(deployment) as connection:
        session, service = connection.session, connection.history.record.adopted_serving
        logs.require_instances(session, [instance])
        answers, reached = await connection.ask(
            lambda name: _running(session, name, instance, service)
        )
        for name, running in answers.items():
            if running:
                container, owner = running
                docker = session.host(name).docker
                return await docker.execute(container, argv, write, deployment=owner)
        reached.require_all()
        raise ContainerMissing(
            f"expected a running container of {instance}, found none on any host",
            instance=instance,
            hint="`pd-deploy status FILE` shows what runs",
        )


async def _running(
    session: Session, host_name: str, instance: str, service: AdoptedService | None
) -> tuple[str, Owner] | None:
    """Find an instance's container that runs on a host, and whose it is: the deployment's, or that
    of the adopted service which serves."""
    host, name = session.host(host_name), session.deployment.name
    label = {generations.DEPLOYMENT: name, generations.INSTANCE: instance}
    for state in await host.docker.containers(label):
        if state.running:
            return state.id, name
    for one in service.containers if service else ():
        is_it = (one.instance, one.host) == (instance, host.address)
        if is_it and any(state.running for state in await host.docker.states([one.id])):
            return one.id, one.handle
    return None


def _print(out: bytes, err: bytes) -> None:
    sys.stdout.buffer.write(out)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(err)
    sys.stderr.buffer.flush()
