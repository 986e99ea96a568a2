"""Requests to one registry: log in, and turn faults into errors (contract section 8.3)."""

import asyncio
import base64
import contextlib
import json
import re
import ssl
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from pd_deploy.errors import (
    ImageNotFound,
    PdDeployError,
    RegistryDenied,
    RegistryMisconfigured,
    RegistryUnavailable,
)
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.registry.headers import Challenge, parse_challenges
from pd_deploy.registry.repository import MAX_PORT, Repository
from pd_deploy.registry.ways import Connect

CONNECT_TIMEOUT_S = 5.0  # short: where this machine can't reach the registry, a host is tried next
READ_TIMEOUT_S = 30.0  # between two pieces of an answer; listing many tags may take a while
ANSWER_TIMEOUT_S = 60.0  # for the whole answer, so that one that trickles in can't hold up a run
MAX_BODY = 16 << 20  # bytes; some registries list all tags at once, and a tag has up to 128
DEFAULT_TOKEN_LIFE_S = 60.0  # what the distribution specification says where a token has no life
JSON = "application/json"
_TLS_FAULTS = (ssl.SSLError, ssl.SSLCertVerificationError)


class Reply(NamedTuple):
    """A server's answer; `body` has the raw bytes, `next_page` is the address from its Link header,
    absolute or relative."""

    status: int
    headers: httpx.Headers
    body: bytes
    next_page: str | None = None


@dataclass(frozen=True)
class _Authorization:
    header: str
    until: float = float("inf")  # by the monotonic clock


class RegistrySession:
    """Requests about one repository, one at a time.

    Credentials go only to the registry, or to the server that it names for tokens; no redirect is
    followed. Connections are opened on demand and last until `aclose`.

    Args:
        repository: the repository.
        connect: opens connections.
        login: the credentials; None asks anonymously.
        where: the host that requests go through, for messages; None is this machine.
    """

    def __init__(
        self,
        repository: Repository,
        connect: Connect,
        login: RegistryLogin | None,
        where: str | None,
    ) -> None:
        self.repository = repository
        self._connect = connect
        self._login = login
        self._where = where
        self._clients: dict[tuple[str, int], httpx.AsyncClient] = {}
        self._open = contextlib.AsyncExitStack()
        self._authorization: _Authorization | None = None

    async def aclose(self) -> None:
        """Close all connections; safe to call twice."""
        self._clients.clear()
        await self._open.aclose()

    async def ask(
        self,
        method: str,
        url: httpx.URL,
        subject: str,
        accept: str = JSON,
        expected: Collection[int] = (httpx.codes.OK,),
    ) -> Reply:
        """Return the registry's answer; log in if the registry requires it.

        Args:
            method: GET or HEAD.
            url: an address on the registry.
            subject: what is asked for, for messages.
            accept: the accepted media types.
            expected: the statuses that count as answers; others are errors.

        Raises:
            ImageNotFound: the subject does not exist.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        answer = await self.send(method, url, self._current_authorization(), accept)
        if answer.status == httpx.codes.UNAUTHORIZED:
            self._authorization = await self._log_in(self.challenge_in(answer), subject)
            answer = await self.send(method, url, self._authorization.header, accept)
        if answer.status not in expected:
            raise self.refusal(answer.status, subject)
        return answer

    def _current_authorization(self) -> str | None:
        current = self._authorization
        return current.header if current and time.monotonic() < current.until else None

    def challenge_in(self, answer: Reply) -> Challenge:
        """Choose how to log in to the registry; prefer a token to a password.

        Raises:
            RegistryMisconfigured: the registry offers neither.
        """
        offered = parse_challenges(answer.headers.get_list("www-authenticate"))
        for scheme in ("bearer", "basic"):
            for challenge in offered:
                if challenge.scheme == scheme:
                    return challenge
        schemes = ", ".join(challenge.scheme for challenge in offered) or "none"
        raise self.misconfigured(f"expected a Bearer or Basic login, found {schemes}")

    async def _log_in(self, challenge: Challenge, subject: str) -> "_Authorization":
        if challenge.scheme == "bearer":
            return await self._token(challenge, subject)
        if self._login is None:
            raise self.refusal(httpx.codes.UNAUTHORIZED, subject)
        return _Authorization(_basic(self._login))

    async def _token(self, challenge: Challenge, subject: str) -> "_Authorization":
        url = self._realm(challenge).copy_set_param(
            "scope", f"repository:{self.repository.path}:pull"
        )
        if service := challenge.parameters.get("service"):
            url = url.copy_set_param("service", service)
        requested_at = time.monotonic()
        answer = await self.send("GET", url, _basic(self._login) if self._login else None)
        if answer.status == httpx.codes.NOT_FOUND:
            raise self.misconfigured(f"expected tokens from {url.host}, which answers 404")
        if answer.status != httpx.codes.OK:
            raise self.refusal(answer.status, f"{subject}: a token from {url.host}")
        grant = self.document_in(answer, f"a token from {url.host}")
        token, life = grant.get("token") or grant.get("access_token"), grant.get("expires_in")
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise self.misconfigured(f"expected a token from {url.host}, found none")
        if not isinstance(life, int | float):
            life = DEFAULT_TOKEN_LIFE_S
        return _Authorization(f"Bearer {token}", requested_at + life)

    def _realm(self, challenge: Challenge) -> httpx.URL:
        """Return the address that issues tokens; require TLS where the registry has TLS."""
        try:
            realm = httpx.URL(challenge.parameters.get("realm", ""))
        except httpx.InvalidURL:
            realm = httpx.URL()
        schemes = ("http", "https") if self.repository.plain else ("https",)
        usable = realm.host and not realm.userinfo and (realm.port or 0) <= MAX_PORT
        if realm.scheme not in schemes or not usable:
            raise self.misconfigured(
                f"expected it to name {' or '.join(schemes)}://… for tokens, found another address"
            )
        return realm

    async def send(
        self, method: str, url: httpx.URL, authorization: str | None = None, accept: str = JSON
    ) -> Reply:
        """Send a request; return the answer, whatever its status, except a redirect.

        Raises:
            RegistryUnavailable: no answer in time.
            RegistryMisconfigured: untrusted TLS, something other than HTTP, a redirect, or a web
                page.
        """
        # Uncompressed: the digest is of the raw bytes, and MAX_BODY limits what is really read.
        headers = {"Accept": accept, "Accept-Encoding": "identity"}
        if authorization:
            headers["Authorization"] = authorization
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                client = await self._client(url)
                request = client.build_request(
                    method,
                    url,
                    headers=headers,
                    timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                )
                response = await client.send(request, stream=True, follow_redirects=False)
                async with contextlib.aclosing(response):
                    body = await self._body(response)
        # The resolver raises UnicodeError for what can't be a host's name.
        except (httpx.RequestError, TimeoutError, UnicodeError) as exc:
            raise self._no_answer(url, exc) from None
        if response.is_redirect:
            target = response.headers.get("location", "").partition("?")[0]
            raise self.misconfigured(f"expected an answer, found a redirect to {target}")
        if response.is_success and "text/html" in response.headers.get("content-type", "").lower():
            raise self.misconfigured(
                f"expected a registry, but {url.host} answers with a web page",
                "check the registry's address and port; in some networks, a sign-in page answers "
                "for every server until somebody has signed in",
            )
        next_page = response.links.get("next", {}).get("url")
        return Reply(response.status_code, response.headers, body, next_page)

    async def _client(self, url: httpx.URL) -> httpx.AsyncClient:
        server = url.host, url.port or (443 if url.scheme == "https" else 80)
        if server not in self._clients:
            opening = self._connect(*server)
            self._clients[server] = await self._open.enter_async_context(opening)
        return self._clients[server]

    async def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_BODY:
                raise self.misconfigured(
                    f"expected an answer of at most {MAX_BODY >> 20} MiB, found more"
                )
        return bytes(body)

    def document_in(self, answer: Reply, subject: str) -> dict[str, Any]:
        """Parse the JSON document in an answer.

        Raises:
            RegistryMisconfigured: the answer has none.
        """
        try:
            document = json.loads(answer.body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self.misconfigured(f"expected {subject} as JSON, found something else")
        return document

    def _no_answer(self, url: httpx.URL, exc: Exception) -> PdDeployError:
        fault = _tls_fault(exc)
        if isinstance(fault, ssl.SSLCertVerificationError):
            return self.misconfigured(
                f"the certificate of {url.host} is not trusted ({fault.verify_message})",
                "name the CA's file, `registry: {ca: …}`",
            )
        if fault:
            return self.misconfigured(
                f"the TLS handshake with {url.host} failed ({fault.reason or fault})",
                "if it speaks plain HTTP, set `registry: {insecure: true}`",
            )
        if isinstance(exc, httpx.RemoteProtocolError) and "illegal" in str(exc):
            return self.misconfigured(f"expected a registry, but {url.host} does not speak HTTP")
        return RegistryUnavailable(
            f"{url.netloc.decode()} does not answer ({_reason(exc)})",
            host=self._where,
            hint="check the registry's address, and that the registry is running",
        )

    def refusal(self, status: int, subject: str) -> PdDeployError:
        """Make the error for an unexpected status in answer to a request for `subject`."""
        message = f"{subject}: {self.repository.registry} answers {status}"
        if status == httpx.codes.NOT_FOUND:
            return ImageNotFound(
                f"{subject} is not in the registry",
                host=self._where,
                hint="check the repository and the tag",
            )
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            hint = "check the registry credentials and the repository's name"
            if self._login is None:
                hint = "set `registry: {credentials: …}`, or check the repository's name"
            return RegistryDenied(message, host=self._where, hint=hint)
        if status in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS) or status >= 500:
            return RegistryUnavailable(message, host=self._where, hint="wait, then run again")
        return self.misconfigured(f"expected a registry's answer, found another: {message}")

    def misconfigured(self, message: str, hint: str | None = None) -> RegistryMisconfigured:
        """Make the error for a server that does not behave like a registry."""
        return RegistryMisconfigured(
            f"registry {self.repository.registry}: {message}",
            host=self._where,
            hint=hint or "check the registry's address and port",
        )


def _basic(login: RegistryLogin) -> str:
    pair = f"{login.username}:{login.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _tls_fault(exc: BaseException | None) -> ssl.SSLError | None:
    """Return the TLS error that caused an error, if one did."""
    while exc is not None:
        # Other classes derived from SSLError are about waiting and closed connections.
        if isinstance(exc, ssl.SSLError) and type(exc) in _TLS_FAULTS:
            return exc
        exc = exc.__cause__ or exc.__context__
    return None


def _reason(exc: Exception) -> str:
    if isinstance(exc, TimeoutError | httpx.TimeoutException):
        return "no answer in time"
    return re.sub(r"^\[Errno -?\d+\] ", "", str(exc).rstrip(".")) or "no connection"
