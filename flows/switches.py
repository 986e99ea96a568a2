"""Schedules and automations as people switched them; `prefect deploy` alone would reset them."""

from typing import Any

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound


async def as_left(deployment: str) -> dict[str, Any]:
    """Look up what of a deployment is switched on; a step of `build` in prefect.yaml.

    `prefect deploy` sets a schedule's `active` to what prefect.yaml says, and creates all
    automations again. So prefect.yaml uses `{{ schedule }}` and `{{ automations.NAME }}` from here.
    It also ends the pause of a deployment (the switch for all its schedules on the newer page), and
    takes no `{{ … }}` for that: its schedules are off instead.

    Args:
        deployment: the flow and the deployment, as in `pd-deploy/qwq-3p1d`.

    Returns:
        `schedule`: whether it is on; off until somebody turns it on. `automations`: the same by
        the last word of their names; on until somebody turns them off.
    """
    async with get_client() as client:
        try:
            deployed = await client.read_deployment_by_name(deployment)
        except ObjectNotFound:
            return _switches({}, schedule=False)
        resource = f"prefect.deployment.{deployed.id}"
        automations = await client.read_resource_related_automations(resource)
        return _switches(
            {automation.name.split()[-1]: automation.enabled for automation in automations},
            schedule=not deployed.paused and any(one.active for one in deployed.schedules),
        )


def _switches(automations: dict[str, bool], *, schedule: bool) -> dict[str, Any]:
    return {
        "schedule": schedule,
        "automations": {"interrupted": True, "silent": True} | automations,
    }
