"""Where a repository is, and how its registry is talked to. Pure."""

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
    def of(cls, name: str, *, insecure: bool = False, ca: str | None = None) -> "Repository":
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


def repository_of(deployment: Deployment) -> Repository:
    """Where a deployment's newer images are looked for.

    Raises:
        InvalidInput: the image has no registry in its name.
    """
    of = deployment.registry
    return Repository.of(deployment.update_repository, insecure=of.insecure, ca=of.ca)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
