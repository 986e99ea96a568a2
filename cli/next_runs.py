"""When a service's next scheduled runs are due, asked of the Prefect server without loading
Prefect."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import httpx

from pd_deploy.blocks import server

PATIENCE_S = 1.5
"""The server is asked while the hosts are; nobody waits for it longer than for them."""
OFF = "none: its schedule is off"


@dataclass(frozen=True)
class NextRuns:
    """When the next nightly and the next check of `pd-health` are due, or why that is not known."""

    nightly: str
    check: str


async def told(deployment: str) -> NextRuns:
    """Ask when the next scheduled runs of a service are due."""
    settings = server.settings()
    url = server.url(settings)
    if not url:
        return _not_known("as no Prefect server is configured")
    try:
        async with asyncio.timeout(PATIENCE_S), server.client(settings) as client:
            ask = partial(_next, client, url, deployment)
            nightly, check = await asyncio.gather(
                ask("pd-deploy", "-nightly"), ask("pd-health", "-health")
            )
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = ": check PREFECT_API_AUTH_STRING, or PREFECT_API_KEY" if status in (401, 403) else ""
        return _not_known(f"as {url} answers with status {status}{hint}")
    except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError):
        return _not_known(f"as no Prefect server answered at {url}")
    return NextRuns(
        f"{nightly:%Y-%m-%d %H:%M}" if nightly else OFF,
        f"{check:%Y-%m-%d %H:%M:%S}" if check else OFF,
    )


async def _next(
    client: httpx.AsyncClient, url: str, deployment: str, flow: str, ending: str
) -> datetime | None:
    """Return when the next run of one of a service's deployments is due, in local time.

    Raises:
        httpx.HTTPError, ValueError, LookupError, TypeError: the server does not say.
    """
    question = {
        # The service's name is a tag of all its deployments.
        "flows": {"name": {"any_": [flow]}},
        "deployments": {"tags": {"all_": [deployment]}, "name": {"like_": ending}},
        "flow_runs": {
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"after_": datetime.now(UTC).isoformat()},
        },
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 1,
    }
    answer = await client.post(f"{url}/flow_runs/filter", json=question)
    runs = answer.raise_for_status().json()
    return datetime.fromisoformat(runs[0]["expected_start_time"]).astimezone() if runs else None


def _not_known(why: str) -> NextRuns:
    return NextRuns(f"not known, {why}", f"not known, {why}")
