"""When a service's next nightly is due, asked of the Prefect server without loading Prefect."""

import asyncio
import os
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import httpx

from pd_deploy.cli.local_http import LOOPBACK, trust

PATIENCE_S = 1.5
"""The server is asked while the hosts are; nobody waits for it longer than for them."""


async def told(deployment: str) -> str:
    """Say when the next nightly is due, or why that is not known."""
    settings = {**_profile(), **os.environ}
    url = settings.get("PREFECT_API_URL", "")
    if not url:
        return "not known, as no Prefect server is configured"
    try:
        async with asyncio.timeout(PATIENCE_S), _client(url, settings) as client:
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


def _client(url: str, settings: Mapping[str, str]) -> httpx.AsyncClient:
    """Make a client that logs in, and trusts and spares the proxy, as Prefect's own would.

    Raises:
        OSError: the certificate can't be read.
    """
    user, _, password = settings.get("PREFECT_API_AUTH_STRING", "").partition(":")
    key, authority = settings.get("PREFECT_API_KEY"), settings.get("PREFECT_API_SSL_CERT_FILE")
    unverified = settings.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in ("1", "true")
    return httpx.AsyncClient(
        auth=httpx.BasicAuth(user, password) if user else None,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        verify=trust(Path(authority) if authority else None) if not unverified else False,
        trust_env=httpx.URL(url).host not in LOOPBACK,
    )


def _profile() -> dict[str, str]:
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        profiles = tomllib.loads(path.read_text())
        name = os.environ.get("PREFECT_PROFILE") or profiles["active"]
        return {key: str(value) for key, value in profiles["profiles"][name].items()}
    except (OSError, ValueError, LookupError, AttributeError):
        return {}
