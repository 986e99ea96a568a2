"""What a run would do, from the plan and what is on the hosts. Pure."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from pd_deploy.planning.plans import Action, HostPlan, Plan
from pd_deploy.records import generations
from pd_deploy.records.generations import Containers


def with_actions(
    plan: Plan,
    containers: Containers,
    known: Mapping[str, Collection[str]],
    listening: Mapping[str, Collection[int]],
    stages: Sequence[str],
) -> Plan:
    """The plan with the changes that the stages would make, host by host.

    Args:
        containers: per host, the deployment's containers that exist.
        known: per host, names of the generations whose files are there.
        listening: per host, the TCP ports that somebody listens on.
    """
    stopping = generations.to_stop(plan.roles, containers) if _cleans(stages) else []
    hosts = {}
    for name, host in plan.hosts.items():
        stops = [state.name for where, state in stopping if where == name]
        running = {s.name for s in containers.get(name, ()) if s.status in generations.RUNNING}
        existing = {state.name for state in containers.get(name, ())}
        actions = [Action(verb="stop", subject=container) for container in stops]
        if "launch" in stages:
            actions += _launch(host, existing)
        if "ranktable" in stages and plan.servers not in known.get(name, ()):
            actions += [Action(verb="write", subject=f.path) for f in host.files_of("ranktable")]
        actions += _start(host, running - set(stops), stages)
        if "server" in stages:
            actions += _open(host, running - set(stops), listening.get(name, ()))
        hosts[name] = host.model_copy(update={"actions": actions})
    return plan.model_copy(update={"hosts": hosts})


def as_markdown(plan: Plan) -> str:
    """The changes as a page, host by host."""
    lines = [f"# {plan.deployment}: generation {plan.generation}", "", f"Image `{plan.image}`", ""]
    for name, host in plan.hosts.items():
        listed = [f"- {action.verb} `{action.subject}`" for action in host.actions]
        lines += [f"## {name} ({host.address})", "", *(listed or ["Nothing to do."]), ""]
    return "\n".join(lines)


def _cleans(stages: Sequence[str]) -> bool:
    return "cleanup" in stages or "server" in stages


def _launch(host: HostPlan, existing: set[str]) -> Iterator[Action]:
    for spec in host.containers.values():
        if spec.name not in existing:
            for file in host.files_of("launch"):
                if file.path in spec.command:
                    yield Action(verb="write", subject=file.path)
            yield Action(verb="create", subject=spec.name)


def _start(host: HostPlan, running: set[str], stages: Sequence[str]) -> Iterator[Action]:
    for spec in host.containers.values():
        stage = "proxy" if spec.labels[generations.ROLE] == "proxy" else "server"
        if stage in stages and spec.name not in running:
            yield Action(verb="start", subject=spec.name)


def _open(host: HostPlan, running: set[str], listening: Collection[int]) -> Iterator[Action]:
    for spec in host.containers.values():
        if spec.labels[generations.ROLE] == "proxy":
            port = spec.labels[generations.PORTS]
            if spec.name not in running or int(port) not in listening:
                yield Action(verb="open", subject=f"port {port}")
