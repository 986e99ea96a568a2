"""`pd-deploy diff`: the file against what serves."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pd_deploy.cli.hosts import asking, connected
from pd_deploy.config.models import Deployment
from pd_deploy.errors import NoSuchGeneration
from pd_deploy.flows import survey
from pd_deploy.planning import differences
from pd_deploy.planning.plans import STAGES, Plan
from pd_deploy.records.releases import Release
from pd_deploy.steps import host_records
from pd_deploy.steps.rollout import Rollout


@dataclass(frozen=True)
class Diff:
    """What a run of the file would change.

    Attributes:
        deployment: its name.
        generation: what the file makes.
        serving: what serves; empty if nothing does.
        keys: keys of the file whose values differ, with both.
        parts: what differs of each instance, line by line.
        changes: what a run would do on each host.
        unreadable: why what serves could not be compared in full.
    """

    deployment: str
    generation: str
    serving: str
    keys: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    changes: Sequence[str] = ()
    unreadable: str = ""

    @property
    def is_drift(self) -> bool:
        """Whether what serves is not as the file says."""
        return self.generation != self.serving or bool(self.changes)


def of(deployment: Deployment) -> Diff:
    """Compare a deployment file with what serves; change nothing."""
    with asking([deployment]):
        return asyncio.run(compared(deployment))


async def compared(deployment: Deployment) -> Diff:
    """Compare a deployment file with what serves; see `of`."""
    async with connected(deployment) as reached:
        reached.require_all()
        rollout = await survey.plan(reached.session, None, "a look")
        planned, serving = rollout.plan, rollout.history.serving
        hosts = rollout.with_actions(STAGES).hosts.items()
        changes = [f"{name}: {a.verb} {a.subject}" for name, host in hosts for a in host.actions]
        if serving is None:
            serves = rollout.history.record.serving_name or ""
            return Diff(planned.deployment, planned.generation, serves, changes=changes)
        before, plan, why = await _before(rollout, serving, deployment)
        return Diff(
            planned.deployment,
            planned.generation,
            serving.generation,
            differences.of_files(before, deployment) if before else {},
            differences.of_plans(plan, planned) if plan else {},
            changes,
            why,
        )


async def _before(
    rollout: Rollout, serving: Release, file: Deployment
) -> tuple[Deployment | None, Plan | None, str]:
    """Read the file and the plan of what serves; why not, if that can't be done.

    A run may have been given another image than the file's: the file's own is compared. So is
    `contract: by-image`, in whose place the contract of the image is saved.
    """
    session = rollout.session
    try:
        saved = await host_records.load(session.hosts, session.root, serving.generation)
    except NoSuchGeneration as error:
        return None, None, error.message
    contract = "by-image" if file.contract == "by-image" else saved.deployment.contract
    before = saved.deployment.model_copy(update={"image": serving.file_image, "contract": contract})
    return before, saved.plan, ""


def text(diff: Diff) -> str:
    """Format a comparison for people."""
    if not diff.is_drift:
        lines = [f"{diff.deployment}: {diff.serving} serves, as the file says"]
        if diff.keys:
            lines += ["", "keys that differ, and change nothing that runs:", *_keys(diff)]
        return "\n".join(lines)
    serves = f"{diff.serving} serves" if diff.serving else "nothing serves"
    lines = [f"{diff.deployment}: {serves}, the file makes {diff.generation}"]
    if diff.unreadable:
        lines.append(f"can't be compared with what serves: {diff.unreadable}")
    if diff.keys:
        lines += ["", "keys of the file:", *_keys(diff)]
    for name, part in diff.parts.items():
        lines += ["", f"{name}:", *(f"  {line}" for line in part)]
    if diff.changes:
        lines += ["", "a run would:", *(f"  {change}" for change in diff.changes)]
    return "\n".join(lines)


def _keys(diff: Diff) -> list[str]:
    return [f"  {key}: {before} → {after}" for key, (before, after) in diff.keys.items()]
