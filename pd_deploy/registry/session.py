"""Requests to one registry: its logins, and its faults as errors (contract section 8.3)."""

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

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 60.0
MAX_BODY = 16 << 20  # bytes; some registries list all tags at once
DEFAULT_TOKEN_LIFE_S = 60.0
JSON = "application/json"
_TLS_FAULTS = (ssl.SSLError, ssl.SSLCertVerificationError)


class Reply(NamedTuple):
    """What a server answered; `body` has the bytes as they came, `next_page` is the address,
    absolute or relative, that its Link header gives."""

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

    Credentials go only to the registry or, where it gives out tokens, to there; no redirect is
    followed. Connections are opened on demand and last until `aclose`.

    Args:
        place: the repository.
        connect: opens connections.
        login: the credentials; None asks anonymously.
        where: from where it is asked, for messages; None is this machine.
    """

    def __init__(
        self, place: Repository, connect: Connect, login: RegistryLogin | None, where: str | None
    ) -> None:
        self.place = place
        self._connect = connect
        self._login = login
        self._where = where
        self._clients: dict[tuple[str, int], httpx.AsyncClient] = {}
        self._open = contextlib.AsyncExitStack()
        self._authorization: _Authorization | None = None

    async def aclose(self) -> None:
        """Closes all connections; safe to call twice."""
        self._clients.clear()
        await self._open.aclose()

    async def ask(
        self,
        method: str,
        url: httpx.URL,
        what: str,
        accept: str = JSON,
        expected: Collection[int] = (httpx.codes.OK,),
    ) -> Reply:
        """Return an expected answer of the registry; log in to it if it wants that.

        Args:
            method: GET or HEAD.
            url: an address of the registry's own.
            what: what is asked for, for messages.
            accept: the media types wanted.
            expected: the statuses that are answers; others are errors.

        Raises:
            ImageNotFound: it does not exist.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        answer = await self.send(method, url, self._current_authorization(), accept)
        if answer.status == httpx.codes.UNAUTHORIZED:
            self._authorization = await self._log_in(self.challenge_in(answer), what)
            answer = await self.send(method, url, self._authorization.header, accept)
        if answer.status not in expected:
            raise self.refusal(answer.status, what)
        return answer

    def _current_authorization(self) -> str | None:
        given = self._authorization
        return given.header if given and time.monotonic() < given.until else None

    def challenge_in(self, answer: Reply) -> Challenge:
        """How the registry wants to be logged in to; a token comes before a password.

        Raises:
            RegistryMisconfigured: in no way that is known here.
        """
        offered = parse_challenges(answer.headers.get_list("www-authenticate"))
        for scheme in ("bearer", "basic"):
            for challenge in offered:
                if challenge.scheme == scheme:
                    return challenge
        schemes = ", ".join(challenge.scheme for challenge in offered) or "none"
        raise self.misconfigured(f"expected a login by Bearer or Basic, found {schemes}")

    async def _log_in(self, challenge: Challenge, what: str) -> "_Authorization":
        if challenge.scheme == "bearer":
            return await self._token(challenge, what)
        if self._login is None:
            raise self.refusal(httpx.codes.UNAUTHORIZED, what)
        return _Authorization(_basic(self._login))

    async def _token(self, challenge: Challenge, what: str) -> "_Authorization":
        url = self._realm(challenge).copy_set_param(
            "scope", f"repository:{self.place.repository}:pull"
        )
        if service := challenge.parameters.get("service"):
            url = url.copy_set_param("service", service)
        asked = time.monotonic()
        answer = await self.send("GET", url, _basic(self._login) if self._login else None)
        if answer.status == httpx.codes.NOT_FOUND:
            raise self.misconfigured(f"expected tokens from {url.host}, which answers 404")
        if answer.status != httpx.codes.OK:
            raise self.refusal(answer.status, f"{what}: a token from {url.host}")
        given = self.document_in(answer, f"a token from {url.host}")
        token, life = given.get("token") or given.get("access_token"), given.get("expires_in")
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise self.misconfigured(f"expected a token from {url.host}, found none")
        if not isinstance(life, int | float):
            life = DEFAULT_TOKEN_LIFE_S
        return _Authorization(f"Bearer {token}", asked + life)

    def _realm(self, challenge: Challenge) -> httpx.URL:
        """Where tokens are given out; a registry with TLS has to have one with TLS."""
        try:
            realm = httpx.URL(challenge.parameters.get("realm", ""))
        except httpx.InvalidURL:
            realm = httpx.URL()
        schemes = ("http", "https") if self.place.plain else ("https",)
        is_place = realm.host and not realm.userinfo and (realm.port or 0) <= MAX_PORT
        if realm.scheme not in schemes or not is_place:
            raise self.misconfigured(
                f"expected {' or '.join(schemes)}://… that gives out tokens, found another address"
            )
        return realm

    async def send(
        self, method: str, url: httpx.URL, authorization: str | None = None, accept: str = JSON
    ) -> Reply:
        """Whatever is answered, except a redirect.

        Raises:
            RegistryUnavailable: nothing is answered in time.
            RegistryMisconfigured: no TLS or HTTP that can be trusted or understood, or a web page.
        """
        # Not compressed, as the digest is of the bytes as they are, and so that the bound holds.
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
        # A UnicodeError is the resolver's, of a name that can't be one.
        except (httpx.RequestError, TimeoutError, UnicodeError) as exc:
            raise self._no_answer(url, exc) from None
        if response.is_redirect:
            place = response.headers.get("location", "").partition("?")[0]
            raise self.misconfigured(f"expected an answer, found a redirect to {place}")
        if response.is_success and "text/html" in response.headers.get("content-type", "").lower():
            raise self.misconfigured(
                f"expected a registry, {url.host} answers with a web page",
                "check the registry's address and port; in some networks a login page answers in "
                "place of every server until somebody has signed in",
            )
        next_page = response.links.get("next", {}).get("url")
        return Reply(response.status_code, response.headers, body, next_page)

    async def _client(self, url: httpx.URL) -> httpx.AsyncClient:
        place = url.host, url.port or (443 if url.scheme == "https" else 80)
        if place not in self._clients:
            opening = self._connect(*place)
            self._clients[place] = await self._open.enter_async_context(opening)
        return self._clients[place]

    async def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_BODY:
                raise self.misconfigured(f"expected at most {MAX_BODY >> 20} MiB, found more")
        return bytes(body)

    def document_in(self, answer: Reply, what: str) -> dict[str, Any]:
        """The JSON document that an answer holds.

        Raises:
            RegistryMisconfigured: it holds none.
        """
        try:
            document = json.loads(answer.body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self.misconfigured(f"expected {what} as JSON, found something else")
        return document

    def _no_answer(self, url: httpx.URL, exc: Exception) -> PdDeployError:
        fault = _tls_fault(exc)
        if isinstance(fault, ssl.SSLCertVerificationError):
            return self.misconfigured(
                f"the certificate of {url.host} is not trusted ({fault.verify_message})",
                "name the file with its CA: `registry: {ca: …}`",
            )
        if fault:
            return self.misconfigured(
                f"{url.host} and this machine find no common TLS ({fault.reason or fault})",
                "if it speaks plain HTTP: `registry: {insecure: true}`",
            )
        if isinstance(exc, httpx.RemoteProtocolError) and "illegal" in str(exc):
            return self.misconfigured(f"expected a registry, {url.host} does not speak HTTP")
        return RegistryUnavailable(
            f"{url.netloc.decode()} does not answer ({_reason(exc)})",
            host=self._where,
            hint="check the registry's address, and that it runs",
        )

    def refusal(self, status: int, what: str) -> PdDeployError:
        """The error for an answer other than 200 to a request for `what`."""
        said = f"{what}: {self.place.registry} answers {status}"
        if status == httpx.codes.NOT_FOUND:
            return ImageNotFound(
                f"{what} is not in its registry", host=self._where, hint="check repository and tag"
            )
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            hint = "check the registry credentials and the repository's name"
            if self._login is None:
                hint = "give it credentials, `registry: {credentials: …}`; or check the repository"
            return RegistryDenied(said, host=self._where, hint=hint)
        if status in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS) or status >= 500:
            return RegistryUnavailable(said, host=self._where, hint="wait, then run again")
        return self.misconfigured(f"expected an answer of a registry: {said}")

    def misconfigured(self, what: str, hint: str | None = None) -> RegistryMisconfigured:
        """The error for a server that does not do as a registry does."""
        return RegistryMisconfigured(
            f"registry {self.place.registry}: {what}",
            host=self._where,
            hint=hint or "check the registry's address and port",
        )


def _basic(login: RegistryLogin) -> str:
    pair = f"{login.username}:{login.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _tls_fault(exc: BaseException | None) -> ssl.SSLError | None:
    """The TLS error beneath an error."""
    while exc is not None:
        # The classes derived from SSLError are about waiting and hanging up, except this one.
        if isinstance(exc, ssl.SSLError) and type(exc) in _TLS_FAULTS:
            return exc
        exc = exc.__cause__ or exc.__context__
    return None


def _reason(exc: Exception) -> str:
    if isinstance(exc, TimeoutError | httpx.TimeoutException):
        return "no answer in time"
    return re.sub(r"^\[Errno -?\d+\] ", "", str(exc).rstrip(".")) or "no connection"
