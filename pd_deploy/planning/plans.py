"""The plan: per host, exactly which containers, files and commands make a generation. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.engines.base import Engine, HostFacts, Layout, Service
from pd_deploy.hosts.container_values import ContainerSpec
from pd_deploy.records import generations
from pd_deploy.records.generations import Generation
from pd_deploy.records.releases import History

Stage = Literal["cleanup", "launch", "ranktable", "proxy", "server"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Parts of a deployment, in their order."""

_ANY = Generation(1, "00000000")
# Labels say nothing that is not in the rest, but for the image's tag, which may move.
_LABELS = {"hosts": {"__all__": {"containers": {"__all__": {"labels"}}}}}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class PlannedFile(_Frozen):
    """A file on a host, and the stage that writes it."""

    path: str
    mode: str
    content: str
    stage: str


class PlannedCommand(_Frozen):
    """What runs in a container: the arguments, and the environment exported before."""

    instance: str
    argv: list[str]
    environment: dict[str, str]


class Action(_Frozen):
    """One change on a host: stop, create or start a container, write a file, or open a port."""

    verb: str
    subject: str


class HostPlan(_Frozen):
    """All of one host. `actions` are the changes against what is there, if that is known."""

    address: str
    actions: list[Action] = []
    directories: list[str]
    containers: dict[str, ContainerSpec]
    files: list[PlannedFile]
    commands: list[PlannedCommand]

    def files_of(self, stage: str) -> list[PlannedFile]:
        """The files that a stage writes."""
        return [file for file in self.files if file.stage == stage]


class Plan(_Frozen):
    """All of one generation: hosts → containers, files, commands.

    `servers` names the generation whose servers it runs, as they are: its own, or an older one
    when only the proxy differs.
    """

    deployment: str
    generation: str
    servers: str
    image: str
    hosts: dict[str, HostPlan]

    @property
    def roles(self) -> dict[str, str]:
        """The role of each container, by its name."""
        return {
            spec.name: spec.labels[generations.ROLE]
            for host in self.hosts.values()
            for spec in host.containers.values()
        }

    def generation_of(self, name: str) -> str:
        """The generation in whose directories an instance, or the proxy, lives."""
        return self.container(name).labels[generations.GENERATION]

    def container(self, name: str) -> ContainerSpec:
        """The container of an instance or of the proxy."""
        return next(h.containers[name] for h in self.hosts.values() if name in h.containers)


@dataclass(frozen=True)
class Made:
    """A plan, and what stands for its servers."""

    plan: Plan
    servers_fingerprint: str


def make(
    deployment: Deployment,
    topology: Topology,
    engine: Engine,
    *,
    facts: Mapping[str, HostFacts],
    image: str,
    history: History,
) -> Made:
    """The plan of a deployment.

    Args:
        facts: per host, what was read from it.
        image: the image by digest or id.
        history: what was deployed before; decides the epoch, and whether the servers stay.
    """
    service = Service(deployment, topology, Layout.of(deployment, str(_ANY)), facts, image)
    rendered = _render(engine, service, _ANY, _ANY)
    wanted, servers = _fingerprint(rendered), _fingerprint(_without_proxy(rendered))
    serving = history.serving
    chosen = generations.desired(history.found, wanted, serving.generation if serving else None)
    base = chosen
    if known := history.releases.get(str(chosen)):
        base = Generation.parse(known.servers) or chosen
    elif serving and serving.servers_fingerprint == servers:
        base = Generation.parse(serving.servers) or chosen
    return Made(_render(engine, service, chosen, base), servers)


def _fingerprint(plan: Plan) -> str:
    return generations.fingerprint(plan.model_dump_json(exclude={"servers": True, **_LABELS}))


def _without_proxy(plan: Plan) -> Plan:
    return plan.model_copy(update={"hosts": {n: _servers_of(h) for n, h in plan.hosts.items()}})


def _servers_of(host: HostPlan) -> HostPlan:
    containers = {n: s for n, s in host.containers.items() if s.labels[generations.ROLE] != "proxy"}
    proxies = host.containers.keys() - containers.keys()
    return host.model_copy(
        update={
            "containers": containers,
            "directories": [d for d in host.directories if d.rpartition("/")[2] not in proxies],
            "files": [f for f in host.files if f.path.split("/")[-2] not in proxies],
            "commands": [c for c in host.commands if c.instance not in proxies],
        }
    )


def _render(engine: Engine, service: Service, generation: Generation, servers: Generation) -> Plan:
    """The plan of a generation that runs the servers of a generation."""
    return Plan(
        deployment=service.deployment.name,
        generation=str(generation),
        servers=str(servers),
        image=service.image,
        hosts={
            host: _host(engine, service, host, {"proxy": generation, "server": servers})
            for host in service.deployment.hosts
        },
    )


def _host(
    engine: Engine, service: Service, host: str, generations: Mapping[str, Generation]
) -> HostPlan:
    names = [n for n in service.topology.names if service.topology.host_of(n) == host]
    proxy = service.topology.proxy.name
    generation = {n: generations["proxy" if n == proxy else "server"] for n in names}
    service_of = {n: _laid_out(service, generation[n]) for n in names}
    servers = _laid_out(service, generations["server"])
    ranktables = engine.ranktables(servers, host)
    directories = [servers.layout.ranktables] if ranktables else []
    for name, its in service_of.items():
        directories += [f"{its.layout.directory}/{name}", its.layout.log_directory(name)]
    scripts = [
        PlannedFile(
            path=its.layout.start_script(name),
            mode="0700",
            content=engine.start_script(its, name),
            stage="launch",
        )
        for name, its in service_of.items()
    ]
    return HostPlan(
        address=service.deployment.hosts[host].address,
        directories=directories,
        containers={
            name: _container(engine, its, generation[name], name)
            for name, its in service_of.items()
        },
        files=scripts
        + [
            PlannedFile(path=path, mode="0644", content=content.decode(), stage="ranktable")
            for path, content in ranktables.items()
        ],
        commands=[
            PlannedCommand(
                instance=name,
                argv=engine.command(its, name),
                environment=engine.environment(its, name),
            )
            for name, its in service_of.items()
        ],
    )


def _laid_out(service: Service, generation: Generation) -> Service:
    return replace(service, layout=Layout.of(service.deployment, str(generation)))


def _container(
    engine: Engine, service: Service, generation: Generation, name: str
) -> ContainerSpec:
    topology = service.topology
    instance = next((i for i in topology.instances if i.name == name), None)
    ports = list(instance.ports.values()) if instance else [topology.proxy.port]
    labels = {
        generations.DEPLOYMENT: service.deployment.name,
        generations.GENERATION: str(generation),
        generations.EPOCH: str(generation.epoch),
        generations.INSTANCE: name,
        generations.ROLE: instance.role if instance else "proxy",
        generations.PORTS: ",".join(map(str, ports)),
        generations.DEVICES: instance.device_list if instance else "",
        generations.IMAGE: service.deployment.image_reference,
    }
    return engine.container(service, name).model_copy(update={"labels": labels})
