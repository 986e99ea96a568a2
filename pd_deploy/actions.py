"""What a run would do, from the plan and what the hosts said. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

from pd_deploy import generation
from pd_deploy.plan import Plan
from pd_deploy.rollout import Rollout


@dataclass(frozen=True)
class Action:
    """One change on a host."""

    host: str
    verb: str
    subject: str

    def __str__(self) -> str:
        return f"{self.host}: {self.verb} {self.subject}"


def planned(rollout: Rollout, stages: Sequence[str]) -> list[Action]:
    """The changes that the stages would make, host by host; empty when there is nothing to do."""
    actions: list[Action] = []
    stopping = {state.name for _, state in rollout.stopping()} if "cleanup" in stages else set()
    if "cleanup" in stages:
        actions += [Action(host, "stop", state.name) for host, state in rollout.stopping()]
    for host, planned_host in rollout.plan.hosts.items():
        for name, spec in planned_host.containers.items():
            present = rollout.present(name)
            if present is None and "launch" in stages:
                scripts = planned_host.files_of("launch")
                files = [f.path for f in scripts if PurePosixPath(f.path).parent.name == name]
                actions += [Action(host, "write", path) for path in files]
                actions += [Action(host, "create", spec.name)]
            starting = "proxy" if name == rollout.site.topology.proxy.name else "server"
            running = present is not None and present.status in generation.RUNNING
            if starting in stages and (not running or spec.name in stopping):
                actions += [Action(host, "start", spec.name)]
        new = rollout.plan.generation not in rollout.surveys[host].generations
        if "ranktable" in stages and new:
            actions += [Action(host, "write", f.path) for f in planned_host.files_of("ranktable")]
    return sorted(actions, key=lambda action: action.host)


def as_markdown(plan: Plan, actions: Iterable[Action]) -> str:
    """The changes as a page, host by host."""
    lines = [f"# {plan.deployment}: generation {plan.generation}", "", f"Image `{plan.image}`", ""]
    for host, of_host in groupby(actions, key=lambda action: action.host):
        lines += [f"## {host} ({plan.hosts[host].address})", ""]
        lines += [f"- {action.verb} `{action.subject}`" for action in of_host]
        lines += [""]
    if len(lines) == 4:
        lines += ["Nothing to do."]
    return "\n".join(lines)
