"""When a service's next nightly is due, asked of the Prefect server without loading Prefect."""

import asyncio
from datetime import UTC, datetime

import httpx

from pd_deploy.blocks import server

PATIENCE_S = 1.5
"""The server is asked while the hosts are; nobody waits for it longer than for them."""


async def told(deployment: str) -> str:
    """Say when the next nightly is due, or why that is not known."""
    settings = server.settings()
    url = server.url(settings)
    if not url:
        return "not known, as no Prefect server is configured"
    try:
        async with asyncio.timeout(PATIENCE_S), server.client(settings) as client:
            answer = await client.post(f"{url}/flow_runs/filter", json=_question(deployment))
            runs = answer.raise_for_status().json()
            due = datetime.fromisoformat(runs[0]["expected_start_time"]) if runs else None
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = ": check PREFECT_API_AUTH_STRING, or PREFECT_API_KEY" if status in (401, 403) else ""
        return f"not known, as {url} answers with status {status}{hint}"
    except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError):
        return f"not known, as no Prefect server answered at {url}"
    return f"{due.astimezone():%Y-%m-%d %H:%M}" if due else "none: its schedule is off"


def _question(deployment: str) -> dict[str, object]:
    """Ask for the next scheduled run of the nightly: the service's name is its tag."""
    return {
        "deployments": {"tags": {"all_": [deployment]}, "name": {"like_": "nightly"}},
        "flow_runs": {
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"after_": datetime.now(UTC).isoformat()},
        },
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 1,
    }
