"""What a run would do, from the plan and what is on the hosts. Pure."""

from collections import defaultdict
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
    """Add the changes that the stages would make to a plan, host by host.

    Args:
        containers: per host, the deployment's containers that exist.
        known: per host, names of the generations whose files are there.
        listening: per host, the TCP ports that somebody listens on.
    """
    to_stop: defaultdict[str, list[str]] = defaultdict(list)
    if _cleans(stages):
        for host_name, state in generations.to_stop(plan.roles, containers):
            to_stop[host_name].append(state.name)
    hosts = {}
    for name, host in plan.hosts.items():
        stopping = to_stop[name]
        states = list(containers.get(name, ()))
        running = {s.name for s in states if s.status in generations.RUNNING} - set(stopping)
        actions = [Action(verb="stop", subject=container) for container in stopping]
        if "launch" in stages:
            actions += _launch(host, {state.name for state in states})
        if "ranktable" in stages and host.ranktables and plan.servers not in known.get(name, ()):
            actions += [Action(verb="write", subject=file.path) for file in host.ranktables.files]
        actions += _start(host, running, stages)
        if "server" in stages:
            actions += _open(host, running, listening.get(name, ()))
        hosts[name] = host.model_copy(update={"actions": actions})
    return plan.model_copy(update={"hosts": hosts})


def as_markdown(plan: Plan) -> str:
    """Write the changes as a page, host by host."""
    lines = [f"# {plan.deployment}: generation {plan.generation}", ""]
    lines += [f"Image `{plan.pinned_image}`", ""]
    for name, host in plan.hosts.items():
        listed = [f"- {action.verb} `{action.subject}`" for action in host.actions]
        lines += [f"## {name} ({host.address})", "", *(listed or ["Nothing to do."]), ""]
    return "\n".join(lines)


def _cleans(stages: Sequence[str]) -> bool:
    return "cleanup" in stages or "server" in stages


def _launch(host: HostPlan, existing: set[str]) -> Iterator[Action]:
    for instance in host.instances.values():
        if instance.container.name not in existing:
            yield Action(verb="write", subject=instance.start_script.path)
            yield Action(verb="create", subject=instance.container.name)


def _start(host: HostPlan, running: set[str], stages: Sequence[str]) -> Iterator[Action]:
    for instance in host.instances.values():
        if instance.stage in stages and instance.container.name not in running:
            yield Action(verb="start", subject=instance.container.name)


def _open(host: HostPlan, running: set[str], listening: Collection[int]) -> Iterator[Action]:
    for instance in host.instances.values():
        if instance.role == "proxy":
            (port,) = instance.ports
            if instance.container.name not in running or port not in listening:
                yield Action(verb="open", subject=f"port {port}")
