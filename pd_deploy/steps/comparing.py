"""What a generation changes against the one that serves, by name."""

from dataclasses import replace

from pd_deploy.errors import PdDeployError
from pd_deploy.planning import differences
from pd_deploy.records.releases import Release
from pd_deploy.steps import host_records
from pd_deploy.steps.rollout import Rollout

LISTED = 12  # keys of the file: they are kept with the generation, and shown in a row of a table
OTHERWISE = "neither image nor file: what the hosts say, or pd-deploy itself"


async def with_changes(rollout: Rollout) -> Rollout:
    """Note in a new generation what it changes against the one that serves, if that can be read."""
    serving, release = rollout.history.serving, rollout.release
    if serving is None or serving.generation == release.generation or release.against:
        return rollout
    session = rollout.session
    try:
        saved = await host_records.load(session.hosts, session.root, serving.generation)
    except PdDeployError:
        return rollout
    keys = [*differences.of_files(saved.deployment, session.deployment)]
    noted = release.model_copy(
        update={"against": serving.generation, "changes": named(serving, release, keys)}
    )
    history = rollout.surveyed_history.with_release(noted)
    return replace(rollout, release=noted, surveyed_history=history)


def named(before: Release, after: Release, keys: list[str]) -> tuple[str, ...]:
    """Name what differs between two generations.

    Args:
        keys: of the file, whose values differ.
    """
    old, new = (one.chosen_image.rpartition("/")[2] for one in (before, after))
    changes = []
    if before.digest != after.digest:
        changes.append(f"image {old} → {new}" if old != new else f"image {old}, pushed again")
    changes += ["code"] if before.code != after.code else []
    keys = [key for key in keys if key != "image"]
    changes += keys[:LISTED]
    if len(keys) > LISTED:
        changes.append(f"and {len(keys) - LISTED} more keys")
    return tuple(changes or [OTHERWISE])
