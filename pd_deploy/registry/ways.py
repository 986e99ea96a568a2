"""Ways to a registry: straight from this machine, or through a host; and whom to trust."""

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import httpx

from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts.host import Host

Connect = Callable[[str, int], AbstractAsyncContextManager[httpx.AsyncClient]]
"""Opens a client for all requests to a host's port."""


def trust(ca: str | None = None) -> ssl.SSLContext:
    """Trusts the system's CAs and one more. Reads files, for some 40 ms.

    Args:
        ca: a file's path, or certificates as PEM text.

    Raises:
        InvalidInput: the file can't be read or holds no certificates.
    """
    context = ssl.create_default_context()
    if ca is None:
        return context
    is_text = "-----BEGIN" in ca
    try:
        context.load_verify_locations(**{"cadata" if is_text else "cafile": ca})
    except (OSError, ValueError) as exc:
        found = "other text" if is_text else f"{ca} ({exc})"
        expected = f"expected a file with CA certificates in PEM form, found {found}"
        raise InvalidInput([Problem("registry.ca", expected)]) from None
    return context


def straight(tls: ssl.SSLContext) -> Connect:
    """Connects from this machine, by its HTTP proxy if the environment names one."""
    return lambda _host, _port: httpx.AsyncClient(verify=tls)


def through(host: Host, tls: ssl.SSLContext) -> Connect:
    """Connects as a host would, through its SSH connection; raises as the hosts layer does."""

    @contextlib.asynccontextmanager
    async def connect(address: str, port: int) -> AsyncIterator[httpx.AsyncClient]:
        # Connects by SSH, so that a fault of the host's is not taken for one of the registry's.
        await host.run(["true"])
        async with host.http(address, port, tls=tls) as client:
            yield client

    return connect
