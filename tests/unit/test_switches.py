"""What people switched stays so when `prefect deploy` runs again."""

from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
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
        schedules = [SimpleNamespace(active=is_on) for is_on in active]
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
) -> None:
    monkeypatch.setattr(switches, "get_client", lambda: server)
    assert await switches.as_left(NAME) == {"schedule": schedule, "automations": automations}
