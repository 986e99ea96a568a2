"""The Prefect server over its HTTP API, by Prefect's settings but without Prefect.

Loading Prefect takes a second, which commands that only look at hosts need not wait for.
"""

import ipaddress
import os
import socket
import ssl
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import httpx

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For what is not encrypted: reading the system's CAs takes longer than a request."""


def settings() -> Mapping[str, str]:
    """Read what the environment and Prefect's active profile set, by names of variables."""
    return {**_profile(), **os.environ}


def url(settings: Mapping[str, str]) -> str:
    """Return the URL of the server's API; empty if none is set."""
    return settings.get("PREFECT_API_URL", "").rstrip("/")


def client(settings: Mapping[str, str]) -> httpx.AsyncClient:
    """Make a client that logs in, and trusts and spares the proxy, as Prefect's own would.

    Raises:
        OSError: the certificate can't be read.
    """
    user, _, password = settings.get("PREFECT_API_AUTH_STRING", "").partition(":")
    key, address = settings.get("PREFECT_API_KEY"), httpx.URL(url(settings))
    by_proxy = address.host not in LOOPBACK and bool(getproxies().keys() - {"no"})
    return httpx.AsyncClient(
        auth=httpx.BasicAuth(user, password) if user else None,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        verify=_trusted(settings) if by_proxy or address.scheme == "https" else _TRUSTS_NOBODY,
        trust_env=by_proxy,
    )


def _trusted(settings: Mapping[str, str]) -> ssl.SSLContext | bool:
    if settings.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in ("1", "true"):
        return False
    authority = settings.get("PREFECT_API_SSL_CERT_FILE")
    return trust(Path(authority) if authority else None)


async def block(slug: str, name: str) -> dict[str, Any] | None:
    """Read the values of a block with its secrets.

    Returns None if the server does not just give them, for whatever reason: then Prefect's own
    client is the one to say why.
    """
    configured = settings()
    path = f"/block_types/slug/{slug}/block_documents/name/{name}"
    try:
        async with client(configured) as server:
            answer = await server.get(
                f"{url(configured)}{path}", params={"include_secrets": "true"}
            )
            values = answer.raise_for_status().json()["data"]
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, LookupError, TypeError):
        return None
    return values if isinstance(values, dict) else None


def spare_the_proxy(url: str | None) -> None:
    """Keep requests to this machine, and to a Prefect server nearby, from HTTP and SOCKS proxies
    that the environment names."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    host = _host(url or "")
    near = [*LOOPBACK, *([host] if host and _is_near(host) else [])]
    exempt = [part.strip() for part in given.split(",") if part.strip()]
    value = ",".join(dict.fromkeys([*exempt, *near]))
    # Programs differ in which of the names they read.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = value


def _host(url: str) -> str:
    try:
        return httpx.URL(url).host
    except httpx.InvalidURL:
        return ""  # whoever asks there says what is wrong with it


def _is_near(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in (socket.gethostname(), socket.getfqdn()) or "." not in host
    return address.is_private or address.is_loopback


@cache
def trust(authority: Path | None) -> ssl.SSLContext:
    """Trust the CA in a file, by default those of the system."""
    return ssl.create_default_context(cafile=authority)


def _profile() -> dict[str, str]:
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        profiles = tomllib.loads(path.read_text())
        name = os.environ.get("PREFECT_PROFILE") or profiles["active"]
        return {key: str(value) for key, value in profiles["profiles"][name].items()}
    except (OSError, ValueError, LookupError, AttributeError):
        return {}
