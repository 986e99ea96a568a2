"""The plan: per host and instance, the directories, files, container and command that make a
generation. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.engines.base import Engine, HostFacts, Layout, Service
from pd_deploy.hosts.container_values import ContainerSpec, Mount
from pd_deploy.planning.flat_plans import FlatCommand, FlatFile, FlatHost, FlatPlan
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
    """A file on a host."""

    path: str
    mode: str
    content: str


class Command(_Frozen):
    """What a start script runs in the end, and the environment that it exports before."""

    argv: list[str]
    environment: dict[str, str]


class Action(_Frozen):
    """One change on a host: stop, create or start a container, write a file, or open a port."""

    verb: str
    subject: str


class InstancePlan(_Frozen):
    """All of one instance, or of a proxy, on its host.

    Attributes:
        directory: where its start script lies.
        log_directory: where it writes its log files.
    """

    directory: str
    log_directory: str
    start_script: PlannedFile
    container: ContainerSpec
    command: Command

    @property
    def directories(self) -> list[str]:
        """The directories that are its alone."""
        return [self.directory, self.log_directory]

    @property
    def role(self) -> str:
        """`prefill`, `decode` or `proxy`."""
        return self.container.labels[generations.ROLE]

    @property
    def stage(self) -> Stage:
        """The stage that starts it."""
        return "proxy" if self.role == "proxy" else "server"

    @property
    def ports(self) -> set[int]:
        """The ports that it listens on."""
        return generations.numbers(self.container.labels[generations.PORTS])

    @property
    def devices(self) -> set[int]:
        """The devices of its host that it uses."""
        return generations.numbers(self.container.labels[generations.DEVICES])

    @property
    def generation(self) -> str:
        """The generation in whose directories it lives."""
        return self.container.labels[generations.GENERATION]


class RanktablesPlan(_Frozen):
    """The ranktables that the instances of a host share."""

    directory: str
    files: list[PlannedFile]


class HostPlan(_Frozen):
    """All of one host.

    Attributes:
        actions: the changes against what is there, if that is known.
        ranktables: None where the engine needs none.
        instances: those on this host by name, proxies last.
    """

    address: str
    actions: list[Action] = []
    ranktables: RanktablesPlan | None = None
    instances: dict[str, InstancePlan]

    @model_validator(mode="before")
    @classmethod
    def _read_flat(cls, document: Any) -> Any:
        """Read the form that plans were saved in before instances had plans of their own."""
        if isinstance(document, dict) and "containers" in document:
            return FlatHost.model_validate(document).by_instance()
        return document

    @property
    def directories(self) -> list[str]:
        """All directories, the shared one first."""
        shared = [self.ranktables.directory] if self.ranktables else []
        return [*shared, *(d for plan in self.instances.values() for d in plan.directories)]

    def code(self, root: str) -> dict[str, Mount]:
        """Return the mounts of source trees below a directory, by who sees them: `servers` and
        `proxy`."""
        return {
            "proxy" if plan.role == "proxy" else "servers": mount
            for plan in self.instances.values()
            for mount in plan.container.mounts
            if mount.source.startswith(f"{root}/")
        }

    @property
    def files(self) -> list[PlannedFile]:
        """All files, in the order in which they are written."""
        scripts = [plan.start_script for plan in self.instances.values()]
        return [*scripts, *(self.ranktables.files if self.ranktables else ())]


class Plan(_Frozen):
    """All of one generation, host by host.

    Attributes:
        servers: the generation whose servers it runs, as they are: its own, or an older one when
            only the proxy differs.
        pinned_image: the image by digest, or by id with `pull: never` or from a file.
    """

    deployment: str
    generation: str
    servers: str
    # Plans that older versions have saved call it `image`.
    pinned_image: str = Field(validation_alias=AliasChoices("pinned_image", "image"))
    hosts: dict[str, HostPlan]

    @property
    def roles(self) -> dict[str, str]:
        """The role of each container, by its name."""
        return {
            plan.container.name: plan.role
            for host in self.hosts.values()
            for plan in host.instances.values()
        }

    @property
    def container_names(self) -> dict[str, str]:
        """The name of each container, by instance."""
        instances = (pair for host in self.hosts.values() for pair in host.instances.items())
        return {name: plan.container.name for name, plan in instances}

    def instance(self, name: str) -> InstancePlan:
        """Return the plan of an instance or of a proxy."""
        return next(h.instances[name] for h in self.hosts.values() if name in h.instances)


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
    pinned_image: str,
    history: History,
) -> Made:
    """Make the plan of a deployment.

    Args:
        facts: per host, what was read from it.
        pinned_image: the image by digest or id.
        history: what was deployed before; decides the epoch, and whether the servers stay.
    """
    layout = Layout.of(deployment, str(_ANY))
    service = Service(deployment, topology, layout, facts, pinned_image)
    rendered = _render(engine, service, _ANY, _ANY)
    fingerprint = _fingerprint(rendered)
    servers_fingerprint = _fingerprint(_of_servers(rendered, topology), with_proxy=False)
    serving = history.serving
    generation = generations.desired(
        history.generations, fingerprint, serving.generation if serving else None
    )
    servers = generation
    if release := history.releases.get(str(generation)):
        servers = Generation.parse(release.servers) or generation
    elif serving and serving.servers_fingerprint == servers_fingerprint:
        servers = Generation.parse(serving.servers) or generation
    return Made(_render(engine, service, generation, servers), servers_fingerprint)


def _fingerprint(plan: Plan, *, with_proxy: bool = True) -> str:
    flat = FlatPlan(
        deployment=plan.deployment,
        generation=plan.generation,
        image=plan.pinned_image,
        hosts={name: _flat(host, with_proxy) for name, host in plan.hosts.items()},
    )
    return generations.fingerprint(flat.model_dump_json(exclude=_LABELS))


def _of_servers(plan: Plan, topology: Topology) -> Plan:
    """Leave out hosts that have nothing but further proxies: servers run on when these come or go.

    The first proxy's host stays in, as it always was: without it, servers that run would seem to be
    others than planned.
    """
    further = set(topology.proxy_names[1:])
    hosts = {
        name: host
        for name, host in plan.hosts.items()
        if not host.instances or host.instances.keys() - further
    }
    return plan.model_copy(update={"hosts": hosts})


def _flat(host: HostPlan, with_proxy: bool) -> FlatHost:
    instances = {
        name: plan for name, plan in host.instances.items() if with_proxy or plan.role != "proxy"
    }
    rest = host.model_copy(update={"instances": instances})
    scripts = [(plan.start_script, "launch") for plan in instances.values()]
    ranktables = [
        (file, "ranktable") for file in (host.ranktables.files if host.ranktables else ())
    ]
    return FlatHost(
        address=host.address,
        directories=rest.directories,
        containers={name: plan.container for name, plan in instances.items()},
        files=[FlatFile(**file.model_dump(), stage=stage) for file, stage in scripts + ranktables],
        commands=[
            FlatCommand(instance=name, **plan.command.model_dump())
            for name, plan in instances.items()
        ],
    )


def _render(engine: Engine, service: Service, generation: Generation, servers: Generation) -> Plan:
    """Render a generation that runs the servers of a generation: its own or an older one."""
    ranktables = _ranktables(engine, _laid_out(service, servers))
    instances: dict[str, dict[str, InstancePlan]] = {host: {} for host in service.deployment.hosts}
    for name in service.topology.names:
        of = servers if service.topology.instance(name) else generation
        instances[service.topology.host_of(name)][name] = _instance(engine, service, of, name)
    return Plan(
        deployment=service.deployment.name,
        generation=str(generation),
        servers=str(servers),
        pinned_image=service.pinned_image,
        hosts={
            host: HostPlan(
                address=entry.address,
                ranktables=ranktables.get(host),
                instances=instances[host],
            )
            for host, entry in service.deployment.hosts.items()
        },
    )


def _ranktables(engine: Engine, service: Service) -> dict[str, RanktablesPlan]:
    return {
        host: RanktablesPlan(
            directory=service.layout.ranktables,
            files=[
                PlannedFile(path=path, mode="0644", content=content)
                for path, content in contents.items()
            ],
        )
        for host, contents in engine.ranktables(service).items()
    }


def _instance(engine: Engine, service: Service, generation: Generation, name: str) -> InstancePlan:
    service = _laid_out(service, generation)
    layout = service.layout
    return InstancePlan(
        directory=layout.instance_directory(name),
        log_directory=layout.log_directory(name),
        start_script=PlannedFile(
            path=layout.start_script(name), mode="0700", content=engine.start_script(service, name)
        ),
        container=_container(engine, service, generation, name),
        command=Command(
            argv=engine.command(service, name), environment=engine.environment(service, name)
        ),
    )


def _laid_out(service: Service, generation: Generation) -> Service:
    return replace(service, layout=Layout.of(service.deployment, str(generation)))


def _container(
    engine: Engine, service: Service, generation: Generation, name: str
) -> ContainerSpec:
    topology = service.topology
    instance = topology.instance(name)
    ports = list((instance or topology.proxy(name)).ports.values())
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
