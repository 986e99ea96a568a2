"""Schedules and automations as Prefect's own server counts and matches them.

Here, as its code takes a second to load.
"""

import re
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import FlowRunEngine
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.schemas.schedules import CronSchedule

from pd_deploy.flows import events
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from tests.unit.test_events import AUTOMATIONS, EVERY
from tests.unit.test_prefect_yaml import DEPLOYMENTS, RECOVER

FLOWS = {"deploy": deploy, "rollback": rollback}


@pytest.mark.parametrize(
    ("cron", "after", "due"),
    [
        ("30 2 * * *", "2027-03-27T12:00Z", ["03-28T01:30+0100", "03-29T02:30+0200"]),
        ("30 2 * * *", "2026-10-24T12:00Z", ["10-25T02:30+0200", "10-26T02:30+0100"]),
        ("0 3 * * *", "2027-03-27T12:00Z", ["03-28T03:00+0200", "03-29T03:00+0200"]),
    ],
    ids=["skipped", "repeated", "neither"],
)
async def test_a_time_that_the_clock_skips_or_repeats_comes_once(
    cron: str, after: str, due: list[str]
) -> None:
    """As docs/generations.md says; it is Prefect that counts."""
    schedule = CronSchedule(cron=cron, timezone="Europe/Berlin")
    dates = await schedule.get_dates(2, start=datetime.fromisoformat(after))
    assert [f"{date:%m-%dT%H:%M%z}" for date in dates] == due


@pytest.mark.parametrize("recover", RECOVER, ids=lambda one: one["name"])
def test_heartbeats_of_the_service_and_of_no_other_are_waited_for(recover: dict[str, Any]) -> None:
    """As Prefect's engine makes them and as its server matches them."""
    (silent,) = (t for t in recover["triggers"] if t["posture"] == "Proactive")
    fields = {name: value for name, value in silent.items() if name in EventTrigger.model_fields}
    trigger = EventTrigger.model_validate(fields)
    watched = [(one, FLOWS.get(re.split(r"[:.]", one["entrypoint"])[-1])) for one in DEPLOYMENTS]
    assert sum(flow is not None for _, flow in watched) > len(RECOVER)
    for one, flow in watched:
        if flow is None:
            continue
        run = FlowRun(flow_id=uuid4(), deployment_id=uuid4(), tags=one["tags"])
        resource, related = FlowRunEngine(flow=flow, flow_run=run)._build_heartbeat_event_template()
        heartbeat = ReceivedEvent(
            id=uuid4(),
            occurred=datetime.now(UTC),
            event="prefect.flow-run.heartbeat",
            resource=resource,
            related=[dict(resource) for resource in related],
        )
        is_its = one["tags"][0] == recover["tags"][0]
        assert trigger.covers(heartbeat) is is_its, one["name"]


def test_each_automation_tells_of_the_events_of_every_service() -> None:
    """And of no other event; what goes well is told by none."""
    reactive = [one for one in AUTOMATIONS if one["trigger"]["posture"] == "Reactive"]
    for name in EVERY | {"pd-deploy.another"}:
        event = ReceivedEvent(
            id=uuid4(),
            occurred=datetime.now(UTC),
            event=name,
            resource={"prefect.resource.id": "pd-deploy.deployment.any-name"},
        )
        triggers = [EventTrigger.model_validate(one["trigger"]) for one in reactive]
        covered = [t for t in triggers if t.covers(event) and t.expects(name)]
        silent = name in (events.PROMOTED, events.QUARANTINED, "pd-deploy.another")
        assert len(covered) == (not silent), name


def test_a_run_that_stays_late_is_waited_for_by_the_name_of_its_flow() -> None:
    (late,) = (one for one in AUTOMATIONS if one["trigger"]["posture"] == "Proactive")
    trigger = EventTrigger.model_validate(late["trigger"])
    for flow, waited_for in (("pd-deploy", True), ("pd-fleet", True), ("another", False)):
        event = ReceivedEvent(
            id=uuid4(),
            occurred=datetime.now(UTC),
            event="prefect.flow-run.Late",
            resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
            related=[
                {
                    "prefect.resource.id": f"prefect.flow.{uuid4()}",
                    "prefect.resource.role": "flow",
                    "prefect.resource.name": flow,
                }
            ],
        )
        assert trigger.starts_after(event.event)
        assert trigger.covers(event) is waited_for
