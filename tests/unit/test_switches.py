"""What people switched stays so when `prefect deploy` runs again."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.exceptions import ObjectNotFound

from pd_deploy.flows import switches

NAME = "pd-deploy/qwq-3p1d"


class Prefect:
    """A server with one deployment, or none."""

    def __init__(
        self,
        active: list[bool],
        automations: dict[str, bool],
        name: str = NAME,
        *,
        paused: bool = False,
    ) -> None:
        self._name = name
        kinds = (
            CronSchedule(cron="30 4 * * *", timezone="Asia/Shanghai"),
            IntervalSchedule(interval=timedelta(seconds=90)),
        )
        schedules = [
            SimpleNamespace(active=is_on, schedule=kind)
            for is_on, kind in zip(active, kinds, strict=False)
        ]
        self._deployment = SimpleNamespace(id=uuid4(), schedules=schedules, paused=paused)
        self._automations = [
            SimpleNamespace(name=name, enabled=is_on) for name, is_on in automations.items()
        ]

    async def __aenter__(self) -> "Prefect":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def read_deployment_by_name(self, name: str) -> Any:
        if name != self._name:
            raise ObjectNotFound(Exception("no such deployment"))
        return self._deployment

    async def read_resource_related_automations(self, resource: str) -> list[Any]:
        kind, _, identity = resource.rpartition(".")
        assert (kind, UUID(identity)) == ("prefect.deployment", self._deployment.id)
        return self._automations


@pytest.mark.parametrize(
    ("server", "schedule", "automations"),
    [
        (Prefect([], {}, name="pd-deploy/other"), False, {"interrupted": True, "silent": True}),
        (Prefect([False], {}), False, {"interrupted": True, "silent": True}),
        (
            Prefect([False, True], {"recover qwq-3p1d: silent": False}),
            True,
            {"interrupted": True, "silent": False},
        ),
        (Prefect([True], {}, paused=True), False, {"interrupted": True, "silent": True}),
    ],
    ids=["first deploy", "as deployed", "switched", "paused as a whole"],
)
async def test_switches_are_as_they_were_left(
    monkeypatch: pytest.MonkeyPatch,
    server: Prefect,
    schedule: bool,
    automations: dict[str, bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And of schedules that were on it is said when they were due, as that is not kept."""
    monkeypatch.setattr(switches, "get_client", lambda: server)
    assert await switches.as_left(NAME) == {"schedule": schedule, "automations": automations}
    told = capsys.readouterr().out
    due = [one for one in ("(30 4 * * *, Asia/Shanghai)", "(every 90 s)") if one in told]
    expected = [one.active for one in server._deployment.schedules] if server._name == NAME else []
    assert len(due) == told.count("\n") == sum(expected)
