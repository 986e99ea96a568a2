"""Questions to a registry: which tags, which digest, which build is the newest."""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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

MAX_PAGES = 1000  # a million tags; more is a registry whose pages never end
PAGE = 1000  # tags; a repository of 5,000 takes five requests, not fifty
SMALL_PAGE = 100  # tags, as in the distribution API's examples; for registries that refuse more
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


@dataclass(frozen=True)
class Build:
    """A build: its repository as the file names it, its tag, and the digest (`sha256:…`) that the
    tag had when it was looked up."""

    repository: str
    tag: str
    digest: str

    @property
    def image(self) -> str:
        """The build by its tag."""
        return f"{self.repository}:{self.tag}"


@dataclass(frozen=True)
class Search:
    """What a search for the newest build saw.

    Attributes:
        policy: which tags are builds, and their order.
        tags: all tags of each repository.
        builds: the tags that are builds, the newest first.
        quarantined: the builds in quarantine that are newer than `newest`.
        newest: the newest build that is not to be skipped, if there is one.
    """

    policy: UpdatePolicy
    tags: Mapping[str, tuple[str, ...]]
    builds: tuple[str, ...]
    quarantined: tuple[Build, ...]
    newest: Build | None

    @property
    def newer_of_other_forms(self) -> tuple[str, ...]:
        """Tags that seem newer than the newest build, but that the policy does not take."""
        newest = self.builds[0] if self.builds else ""
        return tags.newer_of_other_forms(self.policy, newest, chain(*self.tags.values()))

    def expect_build(self) -> Build:
        """Return the newest build.

        Raises:
            ImageNotFound: there is none.
        """
        if self.newest:
            return self.newest
        raise ImageNotFound(
            f"expected a build of family {tags.described(self.policy)} in {', '.join(self.tags)}, "
            f"found none to use: {sum(map(len, self.tags.values()))} tags, {len(self.builds)} of "
            f"the family, {len(self.quarantined)} in quarantine",
            hint="`pd-deploy tags FILE` lists all; check `update` in the deployment file, or "
            "deploy a quarantined build by its tag",
        )


class Registry:
    """A client of one repository, for one request at a time.

    A context manager: it opens connections on demand and closes them at the end.

    Args:
        repository: the repository.
        connect: opens connections; see `straight` and `through`.
        login: the credentials; None asks anonymously.
        where: the host that requests go through, for messages; None is this machine.
    """

    def __init__(
        self,
        repository: Repository,
        connect: Connect,
        login: RegistryLogin | None = None,
        *,
        where: str | None = None,
    ) -> None:
        self.repository = repository
        self._session = RegistrySession(repository, connect, login, where)

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
        """Check that a registry answers, whether or not it accepts the credentials.

        Raises:
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        answer = await self._session.send("GET", self.repository.url)
        if answer.status == httpx.codes.UNAUTHORIZED:
            self._session.challenge_in(answer)
        elif answer.status == httpx.codes.NOT_FOUND:
            raise self._session.misconfigured("expected a registry, found a server without /v2/")
        elif answer.status != httpx.codes.OK:
            raise self._session.refusal(answer.status, "the registry")

    async def tags(self) -> list[str]:
        """List all tags of the repository, in no particular order.

        Raises:
            ImageNotFound: there is no such repository.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        first = self._url("tags/list").copy_set_param("n", PAGE)
        # A registry may limit the size of its pages, and refuse to give larger ones.
        answer = await self._page(first, expected=(httpx.codes.OK, httpx.codes.BAD_REQUEST))
        if answer.status == httpx.codes.BAD_REQUEST:
            first = first.copy_set_param("n", SMALL_PAGE)
            answer = await self._page(first)
        tags, seen, following = self._tags_in(answer), {first}, self._next_page(first, answer)
        while following is not None:
            if following in seen or len(seen) == MAX_PAGES:
                raise self._session.misconfigured(
                    f"expected the list of tags to end, found still more after page {len(seen)}"
                )
            seen.add(following)
            answer = await self._page(following)
            tags += self._tags_in(answer)
            following = self._next_page(following, answer)
        return tags

    async def digest(self, tag: str) -> str:
        """Return a tag's digest; that of the index, if the image is for several architectures.

        Raises:
            ImageNotFound: there is no such tag.
            RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
        """
        url = self._url(f"manifests/{quote(tag, safe='')}")
        image, accept = f"{self.repository.name}:{tag}", ", ".join(MANIFESTS)
        head = await self._session.ask("HEAD", url, image, accept)
        digest = str(head.headers.get("docker-content-digest", ""))
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return digest
        manifest = await self._session.ask("GET", url, image, accept)
        self._session.document_in(manifest, f"the manifest of {image}")
        return f"sha256:{hashlib.sha256(manifest.body).hexdigest()}"

    def _url(self, path: str) -> httpx.URL:
        return self.repository.url.join(f"{self.repository.path}/{path}")

    async def _page(self, url: httpx.URL, expected: Collection[int] = (httpx.codes.OK,)) -> Reply:
        subject = f"repository {self.repository.name}"
        return await self._session.ask("GET", url, subject, expected=expected)

    def _tags_in(self, answer: Reply) -> list[str]:
        listed = self._session.document_in(answer, "a list of tags").get("tags") or []
        if not isinstance(listed, list):
            raise self._session.misconfigured("expected a list of tags, found something else")
        return [tag for tag in listed if isinstance(tag, str)]

    def _next_page(self, url: httpx.URL, answer: Reply) -> httpx.URL | None:
        if answer.next_page is None:
            return None
        try:
            following = url.join(answer.next_page)
        except httpx.InvalidURL:
            following = httpx.URL()
        if following.host != url.host:
            raise self._session.misconfigured(
                f"expected the next page of tags on {url.host}, found it on "
                f"{following.host or 'no host'}"
            )
        # Behind a proxy that terminates TLS, a registry gives addresses with its own scheme, port.
        return url.copy_with(raw_path=following.raw_path)


@contextlib.asynccontextmanager
async def reach(
    repository: Repository, *, login: RegistryLogin | None = None, via: Host | None = None
) -> AsyncIterator[Registry]:
    """Reach a registry directly from this machine, or else through a host.

    Any failure from this machine, even an answer that isn't a registry's, may be due to its own
    network, so the host is tried next. A registry on a loopback address is the host's own, so only
    the host is tried.

    Args:
        repository: the repository.
        login: the credentials; None asks anonymously.
        via: the host to go through; None for none.

    Raises:
        RegistryUnavailable: the registry answers neither way.
        RegistryDenied, RegistryMisconfigured: as `Registry.ping`.
        HostError, TransientError: the host doesn't let the connection through.
        InvalidInput: the CA's file is wrong.
    """
    tls = await asyncio.to_thread(trust, repository.ca)
    ways = []
    if via is None or not repository.loopback:
        ways.append(Registry(repository, straight(tls), login))
    if via is not None:
        ways.append(Registry(repository, through(via, tls), login, where=via.where))
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


async def search(
    registries: Sequence[Registry], policy: UpdatePolicy, skip: Collection[str] = ()
) -> Search:
    """Search repositories for the newest build that is not to be skipped.

    Of a tag that several repositories have, the first repository's build counts.

    Args:
        registries: the repositories.
        policy: which tags are builds, and their order.
        skip: digests (`sha256:…`) of builds that are in quarantine.

    Raises:
        ImageNotFound: a repository does not exist.
        RegistryDenied, RegistryUnavailable, RegistryMisconfigured.
    """
    all_tags = {registry.repository.name: tuple(await registry.tags()) for registry in registries}
    holders: dict[str, list[Registry]] = {}
    for registry in registries:
        for tag in set(all_tags[registry.repository.name]):
            holders.setdefault(tag, []).append(registry)
    builds = tags.newest_first(policy, holders)
    candidates = [(tag, registry) for tag in builds for registry in holders[tag]]
    newest, quarantined = None, []
    for tag, registry in candidates:
        try:
            build = Build(registry.repository.name, tag, await registry.digest(tag))
        except ImageNotFound:
            continue  # Deleted; some registries go on listing such a tag.
        if build.digest not in skip:
            newest = build
            break
        quarantined.append(build)
    return Search(policy, all_tags, tuple(builds), tuple(quarantined), newest)


def _worst(faults: list[PdDeployError]) -> PdDeployError:
    """Choose which fault to report: that of the direct way, of the way through a host, or both."""
    first, last = faults[0], faults[-1]
    if first is last or not isinstance(last, RegistryUnavailable):
        return last
    if not isinstance(first, RegistryUnavailable):
        return first
    message = f"{last.message}; directly from this machine: {first.message}"
    return RegistryUnavailable(message, host=last.host, hint=last.hint)
