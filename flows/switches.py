"""What people switched on or off at the server, for `prefect deploy`, which would set it anew."""

from typing import Any

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound


async def as_left(deployment: str) -> dict[str, Any]:
    """Look up how a deployment's switches stand; a step of `build` in prefect.yaml.

    `prefect deploy` writes a schedule's `active` as it stands in prefect.yaml, and makes all
    automations anew. So these take `{{ schedule }}` and `{{ automations.NAME }}` from here.

    Args:
        deployment: the flow and the deployment, as in `pd-deploy/qwq-3p1d`.

    Returns:
        `schedule`: whether it is on; off until somebody turns it on. `automations`: the same by
        the last word of their names; on until somebody turns them off.
    """
    async with get_client() as client:
        try:
            known = await client.read_deployment_by_name(deployment)
        except ObjectNotFound:
            return _switches({}, schedule=False)
        resource = f"prefect.deployment.{known.id}"
        automations = await client.read_resource_related_automations(resource)
        return _switches(
            {one.name.split()[-1]: one.enabled for one in automations},
            schedule=any(one.active for one in known.schedules),
        )


def _switches(automations: dict[str, bool], *, schedule: bool) -> dict[str, Any]:
    return {
        "schedule": schedule,
        "automations": {"interrupted": True, "silent": True} | automations,
    }
