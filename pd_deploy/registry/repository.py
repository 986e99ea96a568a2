"""A repository's address, and how to talk to its registry. Pure."""

import re
from dataclasses import dataclass
from ipaddress import ip_address

import httpx

from pd_deploy.config.fields import REPOSITORY, split_registry
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem

MAX_PORT = 65535
DOCKER_HUB = "docker.io"
# As Docker's engine has it: what an image names, and who answers.
_HUB_NAMES = frozenset({"", DOCKER_HUB, "index.docker.io"})
_HUB_API = "registry-1.docker.io"
_HUB_OFFICIAL = "library"  # where Docker Hub has images whose name has only one part


@dataclass(frozen=True)
class Repository:
    """A repository's address, and how to talk to its registry.

    Args:
        name: the repository as images name it, without a tag.
        registry: its registry, HOST or HOST:PORT; `docker.io` where the name has none.
        path: the repository's path in the registry's API.
        plain: whether it speaks plain HTTP.
        ca: a CA to trust besides the system's: a file's path, or certificates as PEM text.
    """

    name: str
    registry: str
    path: str
    plain: bool = False
    ca: str | None = None

    @classmethod
    def of(cls, name: str, *, insecure: bool = False, ca: str | None = None) -> "Repository":
        """Parse a repository's name, [HOST[:PORT]/]PATH.

        A name without a registry is one of Docker Hub, as with Docker. A registry speaks TLS unless
        `insecure` is set, or it has a loopback address and no `ca`; Docker Hub always does.

        Raises:
            InvalidInput: the name is not a repository's.
        """
        host, path = split_registry(name)
        if host in _HUB_NAMES and re.fullmatch(REPOSITORY, path):
            official = "/" not in path
            return cls(name, DOCKER_HUB, f"{_HUB_OFFICIAL}/{path}" if official else path, ca=ca)
        parts = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", host)
        port_fits = parts and int((parts[2] or ":443")[1:]) <= MAX_PORT
        if not port_fits or not re.fullmatch(REPOSITORY, path):
            expected = "to list tags, expected a repository, [HOST[:PORT]/]PATH"
            raise InvalidInput([Problem("image", f"{expected}; found {name!r}")])
        plain = insecure or (ca is None and _is_loopback(httpx.URL(f"http://{host}").host))
        return cls(name, host, path, plain, ca)

    @property
    def url(self) -> httpx.URL:
        """The root of the registry's API."""
        host = _HUB_API if self.registry == DOCKER_HUB else self.registry
        return httpx.URL(f"{'http' if self.plain else 'https'}://{host}/v2/")

    @property
    def loopback(self) -> bool:
        """Whether the registry has a loopback address, which means a different one to each host."""
        return _is_loopback(self.url.host)


def repositories_of(deployment: Deployment) -> list[Repository]:
    """List the repositories to search for a deployment's newer images.

    Raises:
        InvalidInput: the image has a name that is not a repository's.
    """
    insecure, ca = deployment.registry.insecure, deployment.registry.ca
    names = deployment.update_repositories
    return [Repository.of(name, insecure=insecure, ca=ca) for name in names]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
