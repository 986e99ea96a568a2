"""Talking to the Prefect server: turn the client's errors into our own."""

import atexit
import base64
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import httpx
import typer
from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from pd_deploy.errors import PdDeployError

ANSWER_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.1
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NO_SERVER = "run `prefect server start`, or unset PREFECT_API_URL for a temporary one"


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
    except (httpx.TransportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise ServerLost(
            f"expected a Prefect server at {get_current_settings().api.url}, found none",
            hint=NO_SERVER,
        ) from error


@contextmanager
def served() -> Iterator[None]:
    """Make sure that there is a Prefect server first, a temporary one if need be; else as
    `reached`."""
    with reached():
        url = get_current_settings().api.url
        if url:
            require_server(url)
        elif get_current_settings().server.ephemeral.enabled:
            _start_temporary()
        else:
            raise ServerLost(
                "expected a Prefect server, found none configured",
                hint="set PREFECT_API_URL, as in http://127.0.0.1:4200/api",
            )
        yield


def spare_the_proxy(url: str | None) -> None:
    """Keep requests to this machine, and to a Prefect server nearby, from HTTP and SOCKS proxies
    that the environment names."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    near = [*LOOPBACK, *([httpx.URL(url).host] if url and _is_near(httpx.URL(url).host) else [])]
    exempt = [part.strip() for part in given.split(",") if part.strip()]
    value = ",".join(dict.fromkeys([*exempt, *near]))
    # Programs differ in which of the names they read.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = value


def _is_near(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in (socket.gethostname(), socket.getfqdn()) or "." not in host
    return address.is_private or address.is_loopback


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
        raise ServerLost(
            f"expected a Prefect server at {url}, found none ({error})", hint=NO_SERVER
        ) from error
    is_json = "json" in answer.headers.get("content-type", "")
    if not answer.is_success or not is_json:
        raise _refusal(url, answer.status_code)


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


def _start_temporary() -> None:
    """Start the temporary server that Prefect would start, and see at once if it ends.

    Raises:
        ServerLost: it does not start.
    """
    server = SubprocessASGIServer()
    if server.running:
        return
    with tempfile.TemporaryFile() as stderr:
        server.port = server.find_available_port()
        process = server.server_process = _spawned(server, stderr)
        try:
            _await_health(server.api_url, process, stderr)
        except BaseException:
            process.kill()
            process.wait()
            server.server_process = None
            raise
    server.running = True
    atexit.register(server.stop)


def _await_health(url: str, process: "subprocess.Popen[bytes]", stderr: IO[bytes]) -> None:
    patience = get_current_settings().server.ephemeral.startup_timeout_seconds
    deadline = time.monotonic() + patience
    while not _is_healthy(url):
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            raise ServerLost(
                "the temporary Prefect server did not start "
                + (f"within {patience} s" if ended is None else f"(it ended with {ended})")
                + _last_line(stderr),
                hint=f"see that {get_current_settings().home} is writable and has room, and "
                "that no other version of Prefect has used it; or run `prefect server start` "
                "and set PREFECT_API_URL",
            )
        time.sleep(LOOK_EVERY_S)


def _spawned(server: SubprocessASGIServer, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the server out of the reach of Ctrl-C, with its standard error in a file.

    A terminal sends Ctrl-C to all processes of a command, but the run still needs its server. Where
    the server fails, it prints tracebacks.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    saved = os.dup(2)
    os.dup2(stderr.fileno(), 2)
    try:
        return server._run_uvicorn_command()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=ANSWER_TIMEOUT_S).is_success
    except httpx.TransportError:
        return False


def _last_line(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").split("\n")
    errors = [line.strip() for line in lines if re.match(r"\S*(Error|Exception)\b", line)]
    return f": {errors[-1][:300]}" if errors else ""


def save(block: Block, name: str) -> None:
    """Save a block under a name, and print that it was saved."""
    with served():
        block.save(name, overwrite=True)
    typer.echo(f"saved {block.get_block_type_slug()}/{name}")
