"""When a service's next nightly is due, asked of the Prefect server without loading Prefect."""

import asyncio
import os
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import httpx

PATIENCE_S = 1.5
"""The server is asked while the hosts are; nobody waits for it longer than for them."""


async def told(deployment: str) -> str:
    """Say when the next nightly is due, or why that is not known."""
    url, auth = _server()
    if not url:
        return "not known, as no Prefect server is configured"
    try:
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(auth=auth) as client:
            answer = await client.post(
                f"{url.rstrip('/')}/flow_runs/filter", json=_question(deployment)
            )
            runs = answer.raise_for_status().json()
            due = datetime.fromisoformat(runs[0]["expected_start_time"]) if runs else None
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


def _server() -> tuple[str, httpx.Auth | None]:
    """Return the configured server: of the environment, or else of Prefect's active profile."""
    settings = {**_profile(), **os.environ}
    user, _, password = settings.get("PREFECT_API_AUTH_STRING", "").partition(":")
    auth = httpx.BasicAuth(user, password) if user else None
    return settings.get("PREFECT_API_URL", ""), auth


def _profile() -> dict[str, str]:
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        profiles = tomllib.loads(path.read_text())
        name = os.environ.get("PREFECT_PROFILE") or profiles["active"]
        return {key: str(value) for key, value in profiles["profiles"][name].items()}
    except (OSError, ValueError, LookupError, AttributeError):
        return {}
