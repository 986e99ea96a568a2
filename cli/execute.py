"""`pd-deploy exec`: a command in an instance's container."""

import asyncio
import sys
from collections.abc import Callable, Sequence

from pd_deploy.cli.hosts import asking, connected
from pd_deploy.config.models import Deployment
from pd_deploy.errors import ContainerMissing
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
    """Run a command in an instance's running container; return its exit code.

    Raises:
        InvalidInput: there is no such instance.
        ContainerMissing: it does not run.
    """
    async with connected(deployment) as reached:
        logs.require_instances(reached.session, [instance])
        label = {generations.DEPLOYMENT: deployment.name, generations.INSTANCE: instance}
        for host in reached.session.hosts.values():
            for state in await host.docker.containers(label):
                if state.running:
                    return await host.docker.execute(
                        state.id, argv, write, deployment=deployment.name
                    )
        if reached.away:
            reached.require_all()
        raise ContainerMissing(
            f"expected a running container of {instance}, found none on any host",
            instance=instance,
            hint="`pd-deploy status FILE` shows what runs",
        )


def _print(out: bytes, err: bytes) -> None:
    sys.stdout.buffer.write(out)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(err)
    sys.stderr.buffer.flush()
