"""`pd-deploy diff`: the file against what serves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pd_deploy.cli import planned
from pd_deploy.cli.planned import Planned
from pd_deploy.config.models import Deployment
from pd_deploy.planning import differences
from pd_deploy.planning.plans import Plan
from pd_deploy.records.releases import Release
from pd_deploy.steps.host_records import Saved


@dataclass(frozen=True)
class Diff:
    """What a run of the file would change, as far as the hosts answer.

    Attributes:
        deployment: its name.
        generation: what the file makes; empty if that is not known.
        serving: what serves; empty if nothing does.
        keys: keys of the file whose values differ, with both.
        parts: what differs of each instance, line by line.
        changes: what a run would do on each host that answers.
        unreadable: why what serves could not be compared in full.
        away: what is not known because hosts don't answer, which ones, why, and what to do.
    """

    deployment: str
    generation: str
    serving: str
    keys: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    changes: Sequence[str] = ()
    unreadable: str = ""
    away: Sequence[str] = ()

    @property
    def is_drift(self) -> bool:
        """Whether what serves is known not to be as the file says."""
        return self.generation not in ("", self.serving) or bool(self.changes)


def of(deployment: Deployment) -> Diff:
    """Compare a deployment file with what serves; change nothing."""
    return compared(deployment, planned.of(deployment, None))


def compared(deployment: Deployment, look: Planned) -> Diff:
    """Compare a deployment file with what serves, by what the hosts have said."""
    plan, serving = look.plan, look.history.serving
    keys, parts = dict[str, tuple[str, str]](), dict[str, list[str]]()
    if serving and look.before:
        keys = differences.of_files(_as_given(look.before, serving, deployment), deployment)
        if look.rollout:
            parts = differences.of_plans(look.before.plan, look.rollout.plan)
    return Diff(
        deployment.name,
        plan.generation if plan else "",
        serving.generation if serving else look.history.record.serving_name or "",
        keys,
        parts,
        _changes(plan) if plan else [],
        look.unreadable,
        [look.reservation, *look.rows] if look.away else [],
    )


def _changes(plan: Plan) -> list[str]:
    hosts = plan.hosts.items()
    return [f"{name}: {a.verb} {a.subject}" for name, host in hosts for a in host.actions]


def _as_given(saved: Saved, serving: Release, file: Deployment) -> Deployment:
    """Return the file of what serves.

    A run may have been given another image than the file's: the file's own is compared. So is
    `contract: by-image`, in whose place the contract of the image is saved.
    """
    contract = "by-image" if file.contract == "by-image" else saved.deployment.contract
    return saved.deployment.model_copy(update={"image": serving.file_image, "contract": contract})


def text(diff: Diff) -> str:
    """Format a comparison for people."""
    rest = ["", *diff.away] if diff.away else []
    as_far = ", as far as the hosts answer" if diff.away else ""
    if diff.generation and not diff.is_drift:
        lines = [f"{diff.deployment}: {diff.serving} serves, as the file says{as_far}"]
        if diff.keys:
            lines += ["", "keys that differ, and change nothing that runs:", *_keys(diff)]
        return "\n".join(lines + rest)
    serves = f"{diff.serving} serves" if diff.serving else "nothing serves"
    makes = diff.generation or "what is not known"
    lines = [f"{diff.deployment}: {serves}, the file makes {makes}"]
    if diff.unreadable:
        lines.append(f"can't be compared with what serves: {diff.unreadable}")
    if diff.keys:
        lines += ["", "keys of the file:", *_keys(diff)]
    for name, part in diff.parts.items():
        lines += ["", f"{name}:", *(f"  {line}" for line in part)]
    if diff.changes:
        lines += ["", f"a run would{as_far}:", *(f"  {change}" for change in diff.changes)]
    return "\n".join(lines + rest)


def _keys(diff: Diff) -> list[str]:
    return [f"  {key}: {before} → {after}" for key, (before, after) in diff.keys.items()]
