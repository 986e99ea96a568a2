"""`pd-deploy exec`: a command in an instance's container."""

import asyncio
import sys
from collections.abc import Callable, Sequence

from pd_deploy.cli.hosts import Reached, asking, connected
from pd_deploy.config.models import Deployment
from pd_deploy.errors import ContainerMissing
from pd_deploy.hosts.container_values import Owner
from pd_deploy.hosts.host import Host
from pd_deploy.records import generations
from pd_deploy.steps import logs


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
    async with connected(deployment) as reached:
        logs.require_instances(reached.session, [instance])
        if running := await _running(reached, instance):
            host, container, owner = running
            return await host.docker.execute(container, argv, write, deployment=owner)
        if reached.away:
            reached.require_all()
        raise ContainerMissing(
            f"expected a running container of {instance}, found none on any host",
            instance=instance,
            hint="`pd-deploy status FILE` shows what runs",
        )


async def _running(reached: Reached, instance: str) -> tuple[Host, str, Owner] | None:
    """Find an instance's container that runs, and whose it is: the deployment's, or that of the
    adopted service which serves."""
    name, hosts = reached.session.deployment.name, reached.session.hosts.values()
    label = {generations.DEPLOYMENT: name, generations.INSTANCE: instance}
    for host in hosts:
        for state in await host.docker.containers(label):
            if state.running:
                return host, state.id, name
    service = reached.history.record.adopted_serving
    of_instance = [c for c in service.containers if c.instance == instance] if service else []
    for host, one in ((h, c) for c in of_instance for h in hosts if h.address == c.host):
        if any(state.running for state in await host.docker.states([one.id])):
            return host, one.id, one.handle
    return None


def _print(out: bytes, err: bytes) -> None:
    sys.stdout.buffer.write(out)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(err)
    sys.stderr.buffer.flush()
