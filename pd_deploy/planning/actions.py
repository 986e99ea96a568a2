"""What a run would do, from the plan and what is on the hosts. Pure."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from pd_deploy.hosts.facts import Seen
from pd_deploy.planning.plans import Action, HostPlan, Plan, PlannedFile
from pd_deploy.records import generations
from pd_deploy.records.generations import Containers


def with_actions(
    plan: Plan,
    containers: Containers,
    trees: Mapping[str, Mapping[str, Seen]],
    listening: Mapping[str, Collection[int]],
    stopping: Iterable[tuple[str, str]],
    stages: Sequence[str],
) -> Plan:
    """Add the changes that the stages would make to a plan, host by host.

    Args:
        containers: per host, the deployment's containers that exist.
        trees: per host, what lies in the deployment's directories, by path.
        listening: per host, the TCP ports that somebody listens on.
        stopping: the names of containers that have to stop first, with their host.
    """
    to_stop: defaultdict[str, list[str]] = defaultdict(list)
    if _cleans(stages):
        for host_name, name in stopping:
            to_stop[host_name].append(name)
    hosts = {}
    for name, host in plan.hosts.items():
        stopped = to_stop[name]
        states = list(containers.get(name, ()))
        running = {s.name for s in states if s.status in generations.RUNNING} - set(stopped)
        actions = [Action(verb="stop", subject=container) for container in stopped]
        if "launch" in stages:
            actions += _launch(host, {state.name for state in states}, trees.get(name, {}))
        if "ranktable" in stages and host.ranktables:
            actions += _write(host.ranktables.files, trees.get(name, {}))
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


def _write(files: Iterable[PlannedFile], tree: Mapping[str, Seen]) -> Iterator[Action]:
    """Write the files that are not there as planned: missing, or changed by hand."""
    for file in files:
        sha256 = hashlib.sha256(file.content.encode()).hexdigest()
        if tree.get(file.path) != Seen(False, int(file.mode, 8), sha256):
            yield Action(verb="write", subject=file.path)


def _launch(host: HostPlan, existing: set[str], tree: Mapping[str, Seen]) -> Iterator[Action]:
    for instance in host.instances.values():
        yield from _write([instance.start_script], tree)
        if instance.container.name not in existing:
            yield Action(verb="create", subject=instance.container.name)


def _start(host: HostPlan, running: set[str], stages: Sequence[str]) -> Iterator[Action]:
    for instance in host.instances.values():
        if instance.stage in stages and instance.container.name not in running:
            yield Action(verb="start", subject=instance.container.name)


def _open(host: HostPlan, running: set[str], listening: Collection[int]) -> Iterator[Action]:
    for instance in host.instances.values():
        if instance.role == "proxy":
            # The one for clients comes first; others are for the router's own metrics.
            port = int(instance.container.labels[generations.PORTS].partition(",")[0])
            if instance.container.name not in running or port not in listening:
                yield Action(verb="open", subject=f"port {port}")
