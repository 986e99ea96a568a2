"""Asking a registry which tags a repository has and what they stand for (contract section 8.3).

    async with registry.reach(registry.place_of(deployment), login=login, via=host) as found:
        build = await registry.newest(found, tags.policy_of(deployment))

Nothing is pulled. Credentials go only to the registry, or where it gives out tokens to there; no
redirect is followed.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import httpx

from pd_deploy import tags
from pd_deploy.deployment import REPOSITORY, Deployment, UpdatePolicy, split_registry
from pd_deploy.errors import (
    ImageNotFound,
    InvalidInput,
    PdDeployError,
    Problem,
    RegistryDenied,
    RegistryMisconfigured,
    RegistryUnavailable,
)
from pd_deploy.hosts import Host, RegistryLogin
from pd_deploy.registry_headers import Challenge, next_link, parse_challenges

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 60.0
MAX_BODY = 16 << 20  # bytes; some registries list all tags at once
MAX_PAGES = 1000
MAX_PORT = 65535
PAGE = 100  # tags
DEFAULT_TOKEN_LIFE_S = 60.0
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_JSON = "application/json"

Connect = Callable[[str, int], AbstractAsyncContextManager[httpx.AsyncClient]]
"""Opens a client for all requests to a host's port."""


@dataclass(frozen=True)
class Place:
    """A repository and how its registry is talked to.

    Args:
        registry: the registry as images name it, HOST or HOST:PORT.
        repository: the repository's path in it.
        plain: whether it speaks plain HTTP.
        ca: a CA to trust besides the system's: a file's path, or certificates as PEM text.
    """

    registry: str
    repository: str
    plain: bool = False
    ca: str | None = None

    @classmethod
    def of(cls, name: str, *, insecure: bool = False, ca: str | None = None) -> "Place":
        """The place of a repository's full name, HOST[:PORT]/PATH.

        It speaks TLS, except where `insecure` is set, and where the registry is one of the loopback
        addresses, as with Docker, and has no `ca`.

        Raises:
            InvalidInput: the name has no registry, or is none.
        """
        host, path = split_registry(name)
        parts = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", host)
        port_fits = parts and int((parts[2] or ":443")[1:]) <= MAX_PORT
        if not port_fits or not re.fullmatch(REPOSITORY, path):
            expected = "expected a registry and a repository, HOST[:PORT]/PATH"
            raise InvalidInput([Problem("image", f"{expected}, to look for tags; found {name!r}")])
        plain = insecure or (ca is None and _is_loopback(httpx.URL(f"http://{host}").host))
        return cls(host, path, plain, ca)

    @property
    def name(self) -> str:
        """The repository as images name it, without a tag."""
        return f"{self.registry}/{self.repository}"

    @property
    def url(self) -> httpx.URL:
        """The root of the registry's API."""
        return httpx.URL(f"{'http' if self.plain else 'https'}://{self.registry}/v2/")

    @property
    def loopback(self) -> bool:
        """Whether each machine means itself by it."""
        return _is_loopback(self.url.host)


@dataclass(frozen=True)
class Found:
    """A build: its tag, and the digest (`sha256:…`) that the tag stood for when it was asked."""

    tag: str
    digest: str


class Registry:
    """A repository at its registry, asked one question at a time.

    A context manager: its connections are opened on demand and closed at the end.

    Args:
        place: the repository.
        connect: opens connections; see `straight` and `through`.
        login: the credentials; None asks anonymously.
        where: from where it is asked, for messages; None is this machine.
    """

    def __init__(
        self,
        place: Place,
        connect: Connect,
        login: RegistryLogin | None = None,
        *,
        where: str | None = None,
    ) -> None:
        self.place = place
        self._connect = connect
        self._login = login
        self._where = where
        self._clients: dict[tuple[str, int], httpx.AsyncClient] = {}
        self._open = contextlib.AsyncExitStack()
        self._authorization: _Authorization | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clients.clear()
        await self._open.aclose()

    async def ping(self) -> None:
        """Makes sure that a registry answers; what it thinks of the credentials stays open.

        Raises:
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        answer = await self._send("GET", self.place.url)
        if answer.status == httpx.codes.UNAUTHORIZED:
            self._challenge(answer)
        elif answer.status == httpx.codes.NOT_FOUND:
            raise self._misconfigured("expected a registry, found a server without /v2/")
        elif answer.status != httpx.codes.OK:
            raise self._refusal(answer.status, "the registry")

    async def tags(self) -> list[str]:
        """All tags of the repository, in no order.

        Raises:
            ImageNotFound: there is no such repository.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        found: list[str] = []
        url: httpx.URL | None = self._url("tags/list").copy_set_param("n", PAGE)
        seen: set[httpx.URL] = set()
        while url is not None:
            if url in seen or len(seen) == MAX_PAGES:
                raise self._misconfigured(f"its pages of tags don't end after {len(seen)}")
            seen.add(url)
            answer = await self._ask("GET", url, f"repository {self.place.name}")
            found += self._tags_in(answer)
            url = self._next_page(url, answer)
        return found

    async def digest(self, tag: str) -> str:
        """The digest that a tag stands for; that of the index, if the image is for several
        architectures.

        Raises:
            ImageNotFound: there is no such tag.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        url, what = self._url(f"manifests/{quote(tag, safe='')}"), f"{self.place.name}:{tag}"
        accept = ", ".join(MANIFESTS)
        head = await self._ask("HEAD", url, what, accept)
        digest = str(head.headers.get("docker-content-digest", ""))
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return digest
        manifest = await self._ask("GET", url, what, accept)
        return f"sha256:{hashlib.sha256(manifest.body).hexdigest()}"

    def _url(self, path: str) -> httpx.URL:
        return self.place.url.join(f"{self.place.repository}/{path}")

    async def _ask(self, method: str, url: httpx.URL, what: str, accept: str = _JSON) -> "_Answer":
        """A good answer of the registry, which is logged in to if it wants that."""
        answer = await self._send(method, url, self._current_authorization(), accept)
        if answer.status == httpx.codes.UNAUTHORIZED:
            self._authorization = await self._log_in(self._challenge(answer), what)
            answer = await self._send(method, url, self._authorization.header, accept)
        if answer.status != httpx.codes.OK:
            raise self._refusal(answer.status, what)
        return answer

    def _current_authorization(self) -> str | None:
        given = self._authorization
        return given.header if given and time.monotonic() < given.until else None

    def _challenge(self, answer: "_Answer") -> Challenge:
        offered = parse_challenges(answer.headers.get_list("www-authenticate"))
        for scheme in ("bearer", "basic"):
            for challenge in offered:
                if challenge.scheme == scheme:
                    return challenge
        schemes = ", ".join(challenge.scheme for challenge in offered) or "none"
        raise self._misconfigured(f"expected a login by Bearer or Basic, found {schemes}")

    async def _log_in(self, challenge: Challenge, what: str) -> "_Authorization":
        if challenge.scheme == "bearer":
            return await self._token(challenge, what)
        if self._login is None:
            raise self._refusal(httpx.codes.UNAUTHORIZED, what)
        return _Authorization(_basic(self._login))

    async def _token(self, challenge: Challenge, what: str) -> "_Authorization":
        url = self._realm(challenge).copy_set_param(
            "scope", f"repository:{self.place.repository}:pull"
        )
        if service := challenge.parameters.get("service"):
            url = url.copy_set_param("service", service)
        asked = time.monotonic()
        answer = await self._send("GET", url, _basic(self._login) if self._login else None)
        if answer.status == httpx.codes.NOT_FOUND:
            raise self._misconfigured(f"expected tokens from {url.host}, which answers 404")
        if answer.status != httpx.codes.OK:
            raise self._refusal(answer.status, f"{what}: a token from {url.host}")
        given = self._document(answer, f"a token from {url.host}")
        token, life = given.get("token") or given.get("access_token"), given.get("expires_in")
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise self._misconfigured(f"expected a token from {url.host}, found none")
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
            raise self._misconfigured(
                f"expected {' or '.join(schemes)}://… that gives out tokens, found another address"
            )
        return realm

    async def _send(
        self, method: str, url: httpx.URL, authorization: str | None = None, accept: str = _JSON
    ) -> "_Answer":
        """Whatever is answered, except what nothing can be made of."""
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
            raise self._misconfigured(f"expected an answer, found a redirect to {place}")
        return _Answer(response.status_code, response.headers, body)

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
                raise self._misconfigured(f"expected at most {MAX_BODY >> 20} MiB, found more")
        return bytes(body)

    def _document(self, answer: "_Answer", what: str) -> dict[str, Any]:
        try:
            document = json.loads(answer.body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._misconfigured(f"expected {what} as JSON, found something else")
        return document

    def _tags_in(self, answer: "_Answer") -> list[str]:
        found = self._document(answer, "a list of tags").get("tags") or []
        if not isinstance(found, list):
            raise self._misconfigured("expected a list of tags, found something else")
        return [tag for tag in found if isinstance(tag, str)]

    def _next_page(self, url: httpx.URL, answer: "_Answer") -> httpx.URL | None:
        target = next_link(answer.headers)
        if target is None:
            return None
        try:
            following = url.join(target)
        except httpx.InvalidURL:
            following = httpx.URL()
        if following.host != url.host:
            raise self._misconfigured(f"its next page of tags is on {following.host or 'no host'}")
        # Behind a proxy that ends TLS, registries give addresses with their own scheme and port.
        return url.copy_with(raw_path=following.raw_path)

    def _no_answer(self, url: httpx.URL, exc: Exception) -> PdDeployError:
        fault = _tls_fault(exc)
        if isinstance(fault, ssl.SSLCertVerificationError):
            return self._misconfigured(
                f"the certificate of {url.host} is not trusted ({fault.verify_message})",
                "name the file with its CA: `registry: {ca: …}`",
            )
        if fault:
            return self._misconfigured(
                f"{url.host} and this machine find no common TLS ({fault.reason or fault})",
                "if it speaks plain HTTP: `registry: {insecure: true}`",
            )
        if isinstance(exc, httpx.RemoteProtocolError) and "illegal" in str(exc):
            return self._misconfigured(f"expected a registry, {url.host} does not speak HTTP")
        return RegistryUnavailable(
            f"{url.netloc.decode()} does not answer ({_reason(exc)})",
            host=self._where,
            hint="check the registry's address, and that it runs",
        )

    def _refusal(self, status: int, what: str) -> PdDeployError:
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
        return self._misconfigured(f"expected an answer of a registry: {said}")

    def _misconfigured(self, what: str, hint: str | None = None) -> RegistryMisconfigured:
        return RegistryMisconfigured(
            f"registry {self.place.registry}: {what}",
            host=self._where,
            hint=hint or "check the registry's address and port",
        )


def place_of(deployment: Deployment) -> Place:
    """Where a deployment's newer images are looked for.

    Raises:
        InvalidInput: the image has no registry in its name.
    """
    of = deployment.registry
    return Place.of(deployment.update_repository, insecure=of.insecure, ca=of.ca)


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


@contextlib.asynccontextmanager
async def reach(
    place: Place, *, login: RegistryLogin | None = None, via: Host | None = None
) -> AsyncIterator[Registry]:
    """A registry that answers: straight from this machine or else through a host.

    Whatever goes wrong straight from here, also an answer that is no registry's, may be this
    machine's network alone. A registry on a loopback address is the host's own, so it is asked
    through the host at once.

    Args:
        place: the repository.
        login: the credentials; None asks anonymously.
        via: the host to go through; None goes through none.

    Raises:
        RegistryUnavailable: it answers neither way.
        RegistryDenied, RegistryMisconfigured: as `Registry.ping`.
        HostError, TransientError: the host can't be gone through.
        InvalidInput: the CA's file is wrong.
    """
    tls = await asyncio.to_thread(trust, place.ca)
    ways = []
    if via is None or not place.loopback:
        ways.append(Registry(place, straight(tls), login))
    if via is not None:
        ways.append(Registry(place, through(via, tls), login, where=via.where))
    faults = []
    for registry in ways:
        async with registry:
            try:
                await registry.ping()
            except PdDeployError as exc:
                faults.append(exc)
                continue
            yield registry
            return
    raise _worst(faults)


async def newest(registry: Registry, policy: UpdatePolicy, skip: Collection[str] = ()) -> Found:
    """The newest build that is not to be skipped.

    Args:
        registry: the repository.
        policy: which tags are builds, and their order.
        skip: digests (`sha256:…`) of builds that are in quarantine.

    Raises:
        ImageNotFound: there is none.
        RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
    """
    seen = await registry.tags()
    builds = tags.newest_first(policy, seen)
    skipped = 0
    for tag in builds:
        try:
            digest = await registry.digest(tag)
        except ImageNotFound:
            continue  # Deleted; some registries go on listing such a tag.
        if digest not in skip:
            return Found(tag, digest)
        skipped += 1
    raise ImageNotFound(
        f"expected a build of family {tags.described(policy)} in {registry.place.name}, found none "
        f"to use: {len(seen)} tags, {len(builds)} of the family, {skipped} in quarantine",
        hint="check `update` in the deployment file, or take a build out of quarantine",
    )


class _Answer(NamedTuple):
    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True)
class _Authorization:
    header: str
    until: float = float("inf")  # by the monotonic clock


def _basic(login: RegistryLogin) -> str:
    pair = f"{login.username}:{login.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _tls_fault(exc: BaseException | None) -> ssl.SSLError | None:
    """The TLS error beneath an error."""
    while exc is not None:
        # The classes derived from SSLError are about waiting and hanging up, except this one.
        if type(exc) in (ssl.SSLError, ssl.SSLCertVerificationError):
            return exc
        exc = exc.__cause__ or exc.__context__
    return None


def _reason(exc: Exception) -> str:
    if isinstance(exc, TimeoutError | httpx.TimeoutException):
        return "no answer in time"
    return re.sub(r"^\[Errno -?\d+\] ", "", str(exc).rstrip(".")) or "no connection"


def _worst(faults: list[PdDeployError]) -> PdDeployError:
    """The fault to tell of those straight from here and through a host."""
    first, last = faults[0], faults[-1]
    if first is last or not isinstance(last, RegistryUnavailable):
        return last
    if not isinstance(first, RegistryUnavailable):
        return first
    message = f"{last.message}; straight from here: {first.message}"
    return RegistryUnavailable(message, host=last.host, hint=last.hint)
