"""When a service's next scheduled runs are due, asked of the Prefect server without loading
Prefect."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import httpx

from pd_deploy.blocks import server

PATIENCE_S = 1.5
"""The server is asked while the hosts are; nobody waits for it longer than for them."""
OFF = "none: its schedule is off"
NOT_PLANNED = "soon: its schedule is on, and the Prefect server has not planned its next run yet"
NOT_THERE = "none: the Prefect server has no such deployment of the service"


@dataclass(frozen=True)
class NextRuns:
    """When the next nightly and the next check of `pd-health` are due, or why that is not known."""

    nightly: str
    check: str


async def told(names: Iterable[str]) -> NextRuns:
    """Ask when the next scheduled runs of a service are due.

    Args:
        names: of the service, and of its file: its deployments on the server have one as a tag.
    """
    settings = server.settings()
    url = server.url(settings)
    if not url:
        return _not_known("as no Prefect server is configured")
    try:
        async with asyncio.timeout(PATIENCE_S), server.client(settings) as client:
            ask = partial(_next, client, url, list(dict.fromkeys(names)))
            nightly, check = await asyncio.gather(
                ask("pd-deploy", "-nightly"), ask("pd-health", "-health")
            )
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = ": check PREFECT_API_AUTH_STRING, or PREFECT_API_KEY" if status in (401, 403) else ""
        return _not_known(f"as {url} answers with status {status}{hint}")
    except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError):
        return _not_known(f"as no Prefect server answered at {url}")
    return NextRuns(nightly, check)


async def _next(
    client: httpx.AsyncClient, url: str, names: list[str], flow: str, ending: str
) -> str:
    """Say when the next run of one of a service's deployments is due, in local time.

    Raises:
        httpx.HTTPError, ValueError, LookupError, TypeError: the server does not say.
    """
    of_service = {
        "flows": {"name": {"any_": [flow]}},
        "deployments": {"tags": {"any_": names}, "name": {"like_": ending}},
    }
    answer = await client.post(f"{url}/deployments/filter", json=of_service)
    deployments = answer.raise_for_status().json()
    if not deployments:
        return NOT_THERE
    scheduled = [
        deployment["id"]
        for deployment in deployments
        if not deployment["paused"] and any(one["active"] for one in deployment["schedules"])
    ]
    if not scheduled:
        return OFF
    due = {
        "deployments": {"id": {"any_": scheduled}},
        "flow_runs": {
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"after_": datetime.now(UTC).isoformat()},
        },
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 1,
    }
    answer = await client.post(f"{url}/flow_runs/filter", json=due)
    runs = answer.raise_for_status().json()
    if not runs:
        return NOT_PLANNED
    when = datetime.fromisoformat(runs[0]["expected_start_time"]).astimezone()
    return f"{when:%Y-%m-%d %H:%M:%S}"


def _not_known(why: str) -> NextRuns:
    return NextRuns(f"not known, {why}", f"not known, {why}")
