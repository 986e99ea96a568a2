"""Schedules and automations as people switched them; `prefect deploy` alone would reset them."""

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule, IntervalSchedule
from prefect.exceptions import ObjectNotFound


async def as_left(deployment: str) -> dict[str, Any]:
    """Look up what of a deployment is switched on; a step of `build` in prefect.yaml.

    `prefect deploy` sets a schedule's `active` to what prefect.yaml says, and creates all
    automations again. So prefect.yaml uses `{{ schedule }}` and `{{ automations.NAME }}` from here.
    It also ends the pause of a deployment (the switch for all its schedules on the newer page), and
    takes no `{{ … }}` for that: its schedules are off instead.

    When a schedule is due is prefect.yaml's: `prefect deploy` deletes a deployment's schedules and
    makes those of prefect.yaml. So of those that are on it is printed when they were due.

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
        for one in deployed.schedules:
            if one.active:
                print(
                    f"{deployment}: its schedule that was on ({_due(one.schedule)}) is replaced by "
                    "that of prefect.yaml"
                )
        resource = f"prefect.deployment.{deployed.id}"
        automations = await client.read_resource_related_automations(resource)
        return _switches(
            {automation.name.split()[-1]: automation.enabled for automation in automations},
            schedule=not deployed.paused and any(one.active for one in deployed.schedules),
        )


def _due(schedule: SCHEDULE_TYPES) -> str:
    """Say when a schedule is due."""
    if isinstance(schedule, CronSchedule):
        return f"{schedule.cron}, {schedule.timezone or 'UTC'}"
    if isinstance(schedule, IntervalSchedule):
        return f"every {schedule.interval.total_seconds():g} s"
    return getattr(schedule, "rrule", "never")


def _switches(automations: dict[str, bool], *, schedule: bool) -> dict[str, Any]:
    return {
        "schedule": schedule,
        "automations": {"interrupted": True, "silent": True} | automations,
    }
