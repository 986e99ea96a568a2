"""Questions to a registry: which tags, which digest, which build is the newest."""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx

from pd_deploy.config.models import UpdatePolicy
from pd_deploy.errors import ImageNotFound, PdDeployError, RegistryUnavailable
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.host import Host
from pd_deploy.registry import tags
from pd_deploy.registry.repository import Repository
from pd_deploy.registry.session import RegistrySession, Reply
from pd_deploy.registry.ways import Connect, straight, through, trust

MAX_PAGES = 1000
PAGE = 1000  # tags; 5,000 are read in five requests, not in fifty
SMALL_PAGE = 100  # what a registry allows that refuses more, by the distribution API's own example
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


@dataclass(frozen=True)
class Build:
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
        place: Repository,
        connect: Connect,
        login: RegistryLogin | None = None,
        *,
        where: str | None = None,
    ) -> None:
        self.place = place
        self._session = RegistrySession(place, connect, login, where)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.aclose()

    async def ping(self) -> None:
        """Makes sure that a registry answers; what it thinks of the credentials stays open.

        Raises:
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        answer = await self._session.send("GET", self.place.url)
        if answer.status == httpx.codes.UNAUTHORIZED:
            self._session.challenge_in(answer)
        elif answer.status == httpx.codes.NOT_FOUND:
            raise self._session.misconfigured("expected a registry, found a server without /v2/")
        elif answer.status != httpx.codes.OK:
            raise self._session.refusal(answer.status, "the registry")

    async def tags(self) -> list[str]:
        """All tags of the repository, in no order.

        Raises:
            ImageNotFound: there is no such repository.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        first = self._url("tags/list").copy_set_param("n", PAGE)
        # A registry may bound its pages, and refuse to give larger ones.
        answer = await self._page(first, expected=(httpx.codes.OK, httpx.codes.BAD_REQUEST))
        if answer.status == httpx.codes.BAD_REQUEST:
            first = first.copy_set_param("n", SMALL_PAGE)
            answer = await self._page(first)
        tags, seen, following = self._tags_in(answer), {first}, self._next_page(first, answer)
        while following is not None:
            if following in seen or len(seen) == MAX_PAGES:
                raise self._session.misconfigured(f"its pages of tags don't end after {len(seen)}")
            seen.add(following)
            answer = await self._page(following)
            tags += self._tags_in(answer)
            following = self._next_page(following, answer)
        return tags

    async def digest(self, tag: str) -> str:
        """The digest that a tag stands for; that of the index, if the image is for several
        architectures.

        Raises:
            ImageNotFound: there is no such tag.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        url, what = self._url(f"manifests/{quote(tag, safe='')}"), f"{self.place.name}:{tag}"
        accept = ", ".join(MANIFESTS)
        head = await self._session.ask("HEAD", url, what, accept)
        digest = str(head.headers.get("docker-content-digest", ""))
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return digest
        manifest = await self._session.ask("GET", url, what, accept)
        self._session.document_in(manifest, f"the manifest of {what}")
        return f"sha256:{hashlib.sha256(manifest.body).hexdigest()}"

    def _url(self, path: str) -> httpx.URL:
        return self.place.url.join(f"{self.place.repository}/{path}")

    async def _page(self, url: httpx.URL, expected: Collection[int] = (httpx.codes.OK,)) -> Reply:
        what = f"repository {self.place.name}"
        return await self._session.ask("GET", url, what, expected=expected)

    def _tags_in(self, answer: Reply) -> list[str]:
        found = self._session.document_in(answer, "a list of tags").get("tags") or []
        if not isinstance(found, list):
            raise self._session.misconfigured("expected a list of tags, found something else")
        return [tag for tag in found if isinstance(tag, str)]

    def _next_page(self, url: httpx.URL, answer: Reply) -> httpx.URL | None:
        if answer.next_page is None:
            return None
        try:
            following = url.join(answer.next_page)
        except httpx.InvalidURL:
            following = httpx.URL()
        if following.host != url.host:
            raise self._session.misconfigured(
                f"its next page of tags is on {following.host or 'no host'}"
            )
        # Behind a proxy that ends TLS, registries give addresses with their own scheme and port.
        return url.copy_with(raw_path=following.raw_path)


@contextlib.asynccontextmanager
async def reach(
    place: Repository, *, login: RegistryLogin | None = None, via: Host | None = None
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


async def newest(registry: Registry, policy: UpdatePolicy, skip: Collection[str] = ()) -> Build:
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
            return Build(tag, digest)
        skipped += 1
    raise ImageNotFound(
        f"expected a build of family {tags.described(policy)} in {registry.place.name}, found none "
        f"to use: {len(seen)} tags, {len(builds)} of the family, {skipped} in quarantine",
        hint="check `update` in the deployment file, or take a build out of quarantine",
    )


def _worst(faults: list[PdDeployError]) -> PdDeployError:
    """The fault to tell of those straight from here and through a host."""
    first, last = faults[0], faults[-1]
    if first is last or not isinstance(last, RegistryUnavailable):
        return last
    if not isinstance(first, RegistryUnavailable):
        return first
    message = f"{last.message}; straight from here: {first.message}"
    return RegistryUnavailable(message, host=last.host, hint=last.hint)
