"""Talking to the Prefect server: turn the client's errors into our own."""

import base64
import json
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer
from prefect.blocks.core import Block
from prefect.context import refresh_global_settings_context
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from pd_deploy.blocks.server import spare_the_proxy
from pd_deploy.cli import local_server
from pd_deploy.errors import PdDeployError

ANSWER_TIMEOUT_S = 10.0
NO_SERVER = "run `prefect server start`, or unset PREFECT_API_URL for one of this machine"
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
STARTED = (
    "pd-deploy: started a Prefect server on this machine, for this and later commands; "
    "`pd-deploy server stop` ends it"
)


class ServerLost(PdDeployError):
    """The Prefect server can't be reached."""


class ServerRefuses(PdDeployError):
    """What answers at the Prefect server's address does not do as asked."""


@contextmanager
def reached() -> Iterator[None]:
    """Turn the client's errors into one of ours: no server, or a server without the object.

    Raises:
        PdDeployError: the server does not have what was asked for.
        ServerLost: the server can't be reached.
        ServerRefuses: it wants credentials, or is no Prefect server.
    """
    spare_the_proxy(get_current_settings().api.url)
    try:
        yield
    except ObjectNotFound as error:
        raise PdDeployError(
            f"expected a flow run of that id at {get_current_settings().api.url}, found none",
            hint="`prefect flow-run ls` lists the ids",
        ) from error
    except httpx.HTTPStatusError as error:
        answered = error.response
        raise _refusal(str(answered.request.url), answered.status_code) from error
    except json.JSONDecodeError as error:
        if url := get_current_settings().api.url:
            require_server(url)
        raise ServerRefuses(
            f"expected JSON from the Prefect server at {url}, found something else"
        ) from error
    except (httpx.TransportError, httpx.InvalidURL, RuntimeError, ValueError) as error:
        if not isinstance(error, httpx.TransportError | httpx.InvalidURL) and not any(
            words in str(error) for words in ("Failed to reach API", "proxy URL")
        ):
            raise
        raise _lost(get_current_settings().api.url, error) from error


@contextmanager
def served() -> Iterator[None]:
    """Make sure that there is a Prefect server first, one of this machine if need be; else as
    `reached`."""
    with reached():
        url = get_current_settings().api.url
        if url:
            require_server(url)
        elif get_current_settings().server.ephemeral.enabled:
            _use_local()
        else:
            raise ServerLost(
                "expected a Prefect server, found none configured",
                hint="set PREFECT_API_URL, as in http://127.0.0.1:4200/api",
            )
        yield


def require_server(url: str) -> None:
    """Check that a Prefect server answers at a URL and lets us in.

    Raises:
        ServerLost: nothing answers.
        ServerRefuses: it wants credentials, or is no Prefect server.
    """
    api = get_current_settings().api
    if api.key:
        return  # Prefect Cloud, which has other addresses
    headers = {}
    if api.auth_string:
        pair = base64.b64encode(api.auth_string.get_secret_value().encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    verify: ssl.SSLContext | bool = not api.tls_insecure_skip_verify
    if verify and api.ssl_cert_file:
        verify = ssl.create_default_context(cafile=api.ssl_cert_file)
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/admin/version",
            headers=headers,
            # A busy server takes its time, but takes the connection.
            timeout=httpx.Timeout(api.request_timeout, connect=ANSWER_TIMEOUT_S),
            verify=verify,
            follow_redirects=True,
        )
    except httpx.ReadTimeout as error:
        raise ServerLost(
            f"the Prefect server at {url} took the request, and sent no answer within "
            f"{api.request_timeout:g} s",
            hint="look at its log and its machine's load, or wait longer: "
            "PREFECT_API_REQUEST_TIMEOUT, in seconds",
        ) from error
    except (httpx.TransportError, httpx.InvalidURL, OSError, ValueError) as error:
        raise _lost(url, error) from error
    is_json = "json" in answer.headers.get("content-type", "")
    if not answer.is_success or not is_json:
        raise _refusal(url, answer.status_code)


def _lost(url: str | None, error: Exception) -> ServerLost:
    """Make the error for a server that can't be reached; a proxy may be what can't be used."""
    proxies = [name for name in os.environ if name.lower() in PROXIES]
    also = f"; check {', '.join(proxies)}, too" if proxies else ""
    why = " ".join(str(error).split())
    return ServerLost(
        f"expected a Prefect server at {url}, found none{f' ({why})' if why else ''}",
        hint=NO_SERVER + also,
    )


def _refusal(url: str, status: int) -> ServerRefuses:
    """Make the error for an answer that is not the one asked for."""
    configured = get_current_settings().api.url or url
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return ServerRefuses(
            f"the Prefect server at {configured} wants credentials (it answers {status})",
            hint="set PREFECT_API_AUTH_STRING to what the server has as "
            "PREFECT_SERVER_API_AUTH_STRING, here and for the worker",
        )
    if not configured.rstrip("/").endswith("/api") and "/accounts/" not in configured:
        return ServerRefuses(
            f"expected a Prefect server's API at {configured}, found something else",
            hint=f"the URL ends with /api: PREFECT_API_URL={configured.rstrip('/')}/api",
        )
    return ServerRefuses(
        f"expected a Prefect server at {configured}, found one that answers {status}",
        hint="look at its log; if an HTTP proxy answers in its place, name its host in NO_PROXY",
    )


def _use_local() -> None:
    """Use the server that pd-deploy keeps on this machine; start it if need be."""
    server, fresh = local_server.ensure()
    if fresh:
        typer.echo(STARTED, err=True)
    # For all threads: what a context holds, Prefect's threads for logs and events do not see.
    os.environ["PREFECT_API_URL"] = server.api
    os.environ["PREFECT_API_AUTH_STRING"] = server.password
    os.environ["PREFECT_UI_URL"] = ""  # it has none, so no run is said to be seen there
    refresh_global_settings_context()


def save(block: Block, name: str) -> None:
    """Save a block under a name, and print that it was saved."""
    with served():
        block.save(name, overwrite=True)
    typer.echo(f"saved {block.get_block_type_slug()}/{name}")
