"""A service that somebody else has started and that a deployment takes over: generation 0. Pure.

The record has which containers they are. What was started in them is beside it, in files of their
own on the host that it came from, because environments hold secrets.
"""

from collections.abc import Collection, Mapping
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from pd_deploy.hosts.container_values import Adopted

GENERATION = "0"
SHOWN = "0 (adopted)"
DIRECTORY = "adopted"
UNCOMPARED = "pd-deploy has not started what serves; `pd-deploy adopt FILE` compares it"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class AdoptedContainer(_Frozen):
    """A container of it.

    Attributes:
        instance: what it is in the deployment file.
        pod: the one that it is part of there; empty for a proxy, and where an older version wrote.
        host: the address of its host.
        image: as it was given to `docker run`.
        ports: those that its processes listened on, but for those that the kernel had chosen.
        api_ports: of these, those on which vLLM's servers take requests.
    """

    instance: str
    role: str
    pod: str = ""
    host: str
    name: str
    id: str
    image: str
    ports: tuple[int, ...] = ()
    api_ports: tuple[int, ...] = ()

    @property
    def handle(self) -> Adopted:
        """What it is to Docker."""
        return Adopted(self.id, self.name)

    @property
    def file(self) -> str:
        """Where its processes are, below the deployment's directory on its host."""
        return f"{DIRECTORY}/{self.name}.json"


class AdoptedService(_Frozen):
    """All of it.

    Attributes:
        port: at which its first proxy takes requests, and all others that listen on it.
        model: what its servers call the model.
    """

    when: datetime
    by: str
    containers: tuple[AdoptedContainer, ...]
    port: int
    model: str

    @property
    def image(self) -> str:
        """The image of its servers, as far as it is one."""
        servers = [c.image for c in self.containers if c.role != "proxy"]
        return " or ".join(dict.fromkeys(servers))

    @property
    def proxies(self) -> list[AdoptedContainer]:
        """Its proxies."""
        return [c for c in self.containers if c.role == "proxy"]

    def port_of(self, proxy: AdoptedContainer) -> int:
        """Return the port at which one of its proxies takes requests."""
        return self.port if self.port in proxy.ports or not proxy.ports else proxy.ports[0]

    @property
    def servers(self) -> list[AdoptedContainer]:
        """Its servers in the order in which they start: all of them link to each other while they
        load, and decode takes part from the beginning (contract section 4.5)."""
        servers = [c for c in self.containers if c.role != "proxy"]
        return sorted(servers, key=lambda c: c.role)

    def running(self, ids_by_host: Mapping[str, Collection[str]]) -> list[AdoptedContainer]:
        """List its containers that run.

        Args:
            ids_by_host: ids of the containers that run on each host, by address.
        """
        return [c for c in self.containers if c.id in ids_by_host.get(c.host, ())]

    def ids(self) -> frozenset[str]:
        """Ids of all of its containers."""
        return frozenset(c.id for c in self.containers)
