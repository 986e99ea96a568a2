"""Ways to a registry: directly from this machine, or through a host; and which CAs to trust."""

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import httpx

from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts.host import Host

Connect = Callable[[str, int], AbstractAsyncContextManager[httpx.AsyncClient]]
"""Opens an HTTP client for all requests to an address and port."""


def trust(ca: str | None = None) -> ssl.SSLContext:
    """Trust the system's CAs and, if given, one more. Blocks for some 40 ms to read files.

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
        actual = "other text" if is_text else f"{ca} ({exc})"
        message = f"expected a file with CA certificates in PEM form, found {actual}"
        raise InvalidInput([Problem("registry.ca", message)]) from None
    return context


def straight(tls: ssl.SSLContext) -> Connect:
    """Connect from this machine, through an HTTP proxy if the environment names one."""
    return lambda _host, _port: httpx.AsyncClient(verify=tls)


def through(host: Host, tls: ssl.SSLContext) -> Connect:
    """Connect from a host, through its SSH connection; raise what the hosts layer raises."""

    @contextlib.asynccontextmanager
    async def connect(address: str, port: int) -> AsyncIterator[httpx.AsyncClient]:
        # Connect to the host first, so that its fault is not taken for one of the registry's.
        await host.run(["true"])
        async with host.http(address, port, tls=tls) as client:
            yield client

    return connect
