"""A repository's address, and how to talk to its registry. Pure."""

import re
from dataclasses import dataclass
from ipaddress import ip_address

import httpx

from pd_deploy.config.fields import REPOSITORY, split_registry
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem

MAX_PORT = 65535


@dataclass(frozen=True)
class Repository:
    """A repository's address, and how to talk to its registry.

    Args:
        registry: the registry as images name it, HOST or HOST:PORT.
        path: the repository's path in it.
        plain: whether it speaks plain HTTP.
        ca: a CA to trust besides the system's: a file's path, or certificates as PEM text.
    """

    registry: str
    path: str
    plain: bool = False
    ca: str | None = None

    @classmethod
    def of(cls, name: str, *, insecure: bool = False, ca: str | None = None) -> "Repository":
        """Parse a repository's full name, HOST[:PORT]/PATH.

        The registry speaks TLS unless `insecure` is set, or it has a loopback address and no `ca`,
        as with Docker.

        Raises:
            InvalidInput: the name has no registry, or is not a repository's.
        """
        host, path = split_registry(name)
        parts = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", host)
        port_fits = parts and int((parts[2] or ":443")[1:]) <= MAX_PORT
        if not port_fits or not re.fullmatch(REPOSITORY, path):
            expected = "to list tags, expected a registry and a repository, HOST[:PORT]/PATH"
            raise InvalidInput([Problem("image", f"{expected}; found {name!r}")])
        plain = insecure or (ca is None and _is_loopback(httpx.URL(f"http://{host}").host))
        return cls(host, path, plain, ca)

    @property
    def name(self) -> str:
        """The repository as images name it, without a tag."""
        return f"{self.registry}/{self.path}"

    @property
    def url(self) -> httpx.URL:
        """The root of the registry's API."""
        return httpx.URL(f"{'http' if self.plain else 'https'}://{self.registry}/v2/")

    @property
    def loopback(self) -> bool:
        """Whether the registry has a loopback address, which means a different one to each host."""
        return _is_loopback(self.url.host)


def repository_of(deployment: Deployment) -> Repository:
    """Return the repository to search for a deployment's newer images.

    Raises:
        InvalidInput: the image has no registry in its name.
    """
    registry = deployment.registry
    return Repository.of(deployment.update_repository, insecure=registry.insecure, ca=registry.ca)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
