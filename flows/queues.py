"""Queues of Prefect for services that share hosts: their runs come one after the other."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from pd_deploy.config.load import load_deployment

LONGEST = 60  # characters of a name that lists the hosts


async def of_hosts(file: str, pool: str = "pd-pool") -> dict[str, str]:
    """Make the queue of a deployment's hosts if there is none; a step of `build` in prefect.yaml.

    One run at a time leaves it for a worker. A queue that is there keeps the limit that people gave
    it.

    Args:
        file: the deployment file.
        pool: the work pool.

    Returns:
        `queue`: for `work_queue_name`.

    Raises:
        InvalidInput: the file has problems.
    """
    name = name_of(entry.address for entry in load_deployment(Path(file)).hosts.values())
    async with get_client() as client:
        try:
            await client.read_work_queue_by_name(name, work_pool_name=pool)
        except ObjectNotFound:
            await client.create_work_queue(name, concurrency_limit=1, work_pool_name=pool)
    return {"queue": name}


def name_of(addresses: Iterable[str]) -> str:
    """Name the queue of a set of hosts; the same set has the same name in any order."""
    ordered = sorted(set(addresses))
    name = "-".join(["hosts", *ordered])
    if len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"hosts-{ordered[0]}-and-{len(ordered) - 1}-more-{digest}"
