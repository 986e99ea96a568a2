"""prefect.yaml: what its deployments, schedules and automations rest on."""

import importlib
from datetime import datetime, timedelta
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml
from prefect.blocks.core import Block
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from pd_deploy.flows import catalogue, fleet, nights

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = ROOT / "blocks"
OURS, LAB, SCAFFOLD = "prefect.yaml", "demo/prefect.yaml", "cli/scaffold/prefect.yaml"


def document(path: str) -> dict[str, Any]:
    """A file for `prefect deploy`; the scaffold for a service x."""
    text = Template((ROOT / path).read_text()).safe_substitute(name="x", engine="x")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


PRODUCTION: list[dict[str, Any]] = document(OURS)["deployments"]
DEPLOYMENTS: list[dict[str, Any]] = [*PRODUCTION, *document(LAB)["deployments"]]
NIGHTLY = [one for one in DEPLOYMENTS if one["name"].endswith("-nightly")]
HEALTH = [one for one in DEPLOYMENTS if one["name"].endswith("-health")]
(FLEET,) = (one for one in DEPLOYMENTS if one["entrypoint"].endswith(".fleet"))
RECOVER = [one for one in DEPLOYMENTS if "recover" in one["entrypoint"]]


def test_each_service_with_a_recovery_has_a_nightly_and_health_and_no_other_is_scheduled() -> None:
    assert {f"{one['tags'][0]}-nightly" for one in RECOVER} == {one["name"] for one in NIGHTLY}
    assert {f"{one['tags'][0]}-health" for one in RECOVER} == {one["name"] for one in HEALTH}
    scheduled = [one["name"] for one in DEPLOYMENTS if "schedules" in one]
    assert sorted(scheduled) == sorted(one["name"] for one in [*NIGHTLY, *HEALTH, FLEET])


@pytest.mark.parametrize("nightly", NIGHTLY, ids=lambda one: one["name"])
def test_what_makes_a_night_a_night_is_no_parameter_of_a_schedule(nightly: dict[str, Any]) -> None:
    """Prefect's server forgets those whenever somebody switches the schedule."""
    service = nightly["name"].removesuffix("-nightly")
    (by_hand,) = (d for d in DEPLOYMENTS if (d["name"], d["entrypoint"]) == _deploy(service))
    assert nightly["parameters"] == by_hand["parameters"] | {"image": "newest"}
    assert nightly["entrypoint"] == by_hand["entrypoint"]
    assert nightly["tags"] == by_hand["tags"]
    assert not any("parameters" in schedule for schedule in nightly["schedules"])


@pytest.mark.parametrize("one", [*NIGHTLY, *HEALTH, FLEET, *RECOVER], ids=lambda one: one["name"])
def test_switches_are_kept_by_a_step_that_asks_for_this_very_deployment(
    one: dict[str, Any],
) -> None:
    step = {"pd_deploy.flows.switches.as_left": {"deployment": f"{flow_of(one)}/{one['name']}"}}
    assert one["build"][0] == step
    switches = [schedule["active"] for schedule in one.get("schedules", ())]
    switches += [trigger["enabled"] for trigger in one.get("triggers", ())]
    names = ["{{ automations.interrupted }}", "{{ automations.silent }}"]
    assert switches == (names if one in RECOVER else ["{{ schedule }}"])
    for trigger, name in zip(one.get("triggers", ()), ("interrupted", "silent"), strict=False):
        assert trigger["name"].split()[-1] == name


@pytest.mark.parametrize("nightly", NIGHTLY, ids=lambda one: one["name"])
def test_each_night_has_the_minute_of_its_service(nightly: dict[str, Any]) -> None:
    (step,) = nightly["build"][1:]
    given = step["pd_deploy.flows.nights.spread"]
    assert given["name"] == nightly["parameters"]["file"].split("/")[-1].removesuffix(".yaml")
    (schedule,) = nightly["schedules"]
    assert schedule["cron"] == "{{ night }}"
    CronSchedule(cron=nights.spread(**given)["night"], timezone=schedule["timezone"])


@pytest.mark.parametrize("one", HEALTH, ids=lambda one: one["name"])
def test_health_is_checked_each_minute_at_a_second_of_its_service(one: dict[str, Any]) -> None:
    """And is missed while another check goes on: they must not queue up behind one that mends."""
    (step,) = one["build"][1:]
    given = step["pd_deploy.flows.nights.spread_checks"]
    assert given["name"] == one["tags"][0]
    assert one["parameters"] == {"file": f"deployments/{given['name']}.yaml"}
    (schedule,) = one["schedules"]
    assert schedule["anchor_date"] == "{{ checks }}"
    assert "parameters" not in schedule
    anchor = datetime.fromisoformat(nights.spread_checks(**given)["checks"])
    assert IntervalSchedule(interval=timedelta(seconds=schedule["interval"]), anchor_date=anchor)
    assert schedule["interval"] == 60
    assert one["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_the_fleet_is_made_of_deployments_that_there_are() -> None:
    waves = FLEET["parameters"]["waves"]
    deployed = {one["name"] for one in PRODUCTION if one["entrypoint"].endswith(".deploy")}
    assert {service for wave in waves for service in wave} <= deployed
    assert FLEET["parameters"].keys() <= fleet.fleet.parameters.properties.keys()
    assert FLEET["concurrency_limit"]["limit"] == 1


def test_a_production_server_shows_nothing_of_the_lab() -> None:
    assert "lab" not in (ROOT / OURS).read_text()
    assert all("lab" in one["tags"] for one in document(LAB)["deployments"])


@pytest.mark.parametrize("path", [LAB, SCAFFOLD])
def test_all_files_have_the_same_definitions(path: str) -> None:
    """YAML's anchors end with their file."""
    assert document(path)["definitions"] == document(OURS)["definitions"]


@pytest.mark.parametrize("path", [OURS, LAB, SCAFFOLD])
def test_the_name_of_a_deployment_tells_what_it_does(path: str) -> None:
    """As it is shown without its flow; the documented command has the service's name alone."""
    for one in document(path)["deployments"]:
        service, does = one["tags"][0], flow_of(one).removeprefix("pd-")
        if "schedules" in one and does == "deploy":
            does = "nightly"
        named = service if does in ("deploy", "fleet") else f"{service}-{does}"
        assert one["name"] == named
    names = [one["name"] for one in document(path)["deployments"]]
    assert len(names) == len(set(names))


def test_applying_it_registers_the_types_of_blocks() -> None:
    """So that the UI has all of them in its catalogue, whichever were saved by command."""
    definitions = document(OURS)["definitions"]
    assert definitions["deploy"]["build"] == [{"pd_deploy.flows.catalogue.block_types": {}}]


async def test_each_type_of_block_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = set()

    async def register(cls: type[Block]) -> None:
        registered.add(cls)

    monkeypatch.setattr(Block, "aregister_type_and_schema", classmethod(register))
    await catalogue.block_types()
    modules = (importlib.import_module(f"pd_deploy.blocks.{p.stem}") for p in BLOCKS.glob("*.py"))
    assert registered == {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Block) and value is not Block
    }


def test_every_deployment_has_its_service_as_a_tag_of_its_own() -> None:
    """Automations tell services by it; a service's tag must not be a common word of another's."""
    for one in DEPLOYMENTS:
        service = one["tags"][0]
        assert one["name"].startswith(service)
        others = [d for d in DEPLOYMENTS if d["tags"][0] != service]
        assert not any(service in other["tags"] for other in others)


def flow_of(one: dict[str, Any]) -> str:
    """The name of a deployment's flow."""
    return f"pd-{one['entrypoint'].rpartition('.')[2]}"


def _deploy(service: str) -> tuple[str, str]:
    return service, NIGHTLY[0]["entrypoint"]
