"""The plan: per host, exactly which containers, files and commands make a generation. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from pd_deploy import generation as gen
from pd_deploy.deployment import Deployment
from pd_deploy.engines.base import Engine, HostFacts, Layout, Service
from pd_deploy.generation import Generation
from pd_deploy.hosts import ContainerSpec
from pd_deploy.topology import Topology

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
    """All of one generation: hosts → containers, files, commands."""

    deployment: str
    generation: str
    image: str
    hosts: dict[str, HostPlan]

    @property
    def instances(self) -> list[str]:
        """Names of the engine instances, without the proxy."""
        return [
            name
            for host in self.hosts.values()
            for name, spec in host.containers.items()
            if spec.labels[gen.ROLE] != "proxy"
        ]

    def container(self, name: str) -> ContainerSpec:
        """The container of an instance or of the proxy."""
        return next(h.containers[name] for h in self.hosts.values() if name in h.containers)


def make(
    deployment: Deployment,
    topology: Topology,
    engine: Engine,
    *,
    facts: Mapping[str, HostFacts],
    image: str,
    generations: list[str],
) -> Plan:
    """The plan of a deployment.

    Args:
        facts: per host, what was read from it.
        image: the image by digest or id.
        generations: names of the generations found on the hosts; decides the new one's epoch.
    """
    layout = Layout.of(deployment, str(_ANY))
    service = Service(deployment, topology, layout, facts, image)
    wanted = gen.fingerprint(_render(engine, service, _ANY).model_dump_json(exclude=_LABELS))
    chosen = gen.desired(generations, wanted)
    service = replace(service, layout=Layout.of(deployment, str(chosen)))
    return _render(engine, service, chosen)


def _render(engine: Engine, service: Service, generation: Generation) -> Plan:
    return Plan(
        deployment=service.deployment.name,
        generation=str(generation),
        image=service.image,
        hosts={host: _host(engine, service, generation, host) for host in service.deployment.hosts},
    )


def _host(engine: Engine, service: Service, generation: Generation, host: str) -> HostPlan:
    names = [n for n in service.topology.names if service.topology.host_of(n) == host]
    layout = service.layout
    ranktables = engine.ranktables(service, host)
    directories = [layout.ranktables] if ranktables else []
    for name in names:
        directories += [f"{layout.directory}/{name}", layout.log_directory(name)]
    scripts = [
        PlannedFile(
            path=layout.start_script(name),
            mode="0700",
            content=engine.start_script(service, name),
            stage="launch",
        )
        for name in names
    ]
    return HostPlan(
        address=service.deployment.hosts[host].address,
        directories=directories,
        containers={n: _container(engine, service, generation, n) for n in names},
        files=scripts
        + [
            PlannedFile(path=path, mode="0644", content=content.decode(), stage="ranktable")
            for path, content in ranktables.items()
        ],
        commands=[
            PlannedCommand(
                instance=name,
                argv=engine.command(service, name),
                environment=engine.environment(service, name),
            )
            for name in names
        ],
    )


def _container(
    engine: Engine, service: Service, generation: Generation, name: str
) -> ContainerSpec:
    topology = service.topology
    instance = next((i for i in topology.instances if i.name == name), None)
    ports = list(instance.ports.values()) if instance else [topology.proxy.port]
    labels = {
        gen.DEPLOYMENT: service.deployment.name,
        gen.GENERATION: str(generation),
        gen.EPOCH: str(generation.epoch),
        gen.INSTANCE: name,
        gen.ROLE: instance.role if instance else "proxy",
        gen.PORTS: ",".join(map(str, ports)),
        gen.DEVICES: instance.device_list if instance else "",
        gen.IMAGE: service.deployment.image_reference,
    }
    return engine.container(service, name).model_copy(update={"labels": labels})
