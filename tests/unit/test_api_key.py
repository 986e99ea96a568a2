"""A service that wants an API key of its clients: pd-deploy has it, and shows it nowhere."""

from pathlib import Path
from typing import Any

import pytest

from pd_deploy.blocks import loading
from pd_deploy.blocks.fields import SecretFields
from pd_deploy.cli import bench, hosts
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import ApiKey
from pd_deploy.errors import InvalidInput, SmokeTestFailed
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from tests.memory.world import Faults, Reports, World

KEY = "sk-never-shown-0123456789"
SECRETS = "/etc/pd-deploy/qwq.env"
LOAD = {"requests": 20, "concurrency": 1, "input_length": 8, "output_length": 4}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    for machine in world.machines.values():
        machine.disk.put(SECRETS, f"VLLM_API_KEY={KEY}\n".encode(), 0o600)
    world.change(api_key={"environment": "QWQ_API_KEY"}, container={"environment_file": SECRETS})
    return world


def test_every_request_has_the_key_and_nothing_shows_it(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QWQ_API_KEY", KEY)
    world.change(gates={"benchmark": LOAD})
    reports = Reports()
    outcome = world.run(deploy, artifacts=reports.publish)
    assert outcome.completed, outcome.error
    assert world.run(health).word == "Completed"
    on_disk = [
        path
        for machine in world.machines.values()
        for path, content in machine.disk.files("/")
        if KEY.encode() in content
    ]
    assert on_disk == [SECRETS] * len(world.machines)
    configs = [container.config for container in world.containers()]
    shown = (reports.texts, outcome, world.events, configs, caplog.text)
    assert KEY not in repr(shown)


def test_a_key_is_changed_by_an_upgrade(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says; if it fails, the generation before serves with the new key, too."""
    monkeypatch.setenv("QWQ_API_KEY", KEY)
    assert world.run(deploy).completed
    first = world.serving()
    for machine in world.machines.values():
        machine.disk.put(SECRETS, b"VLLM_API_KEY=sk-new\n", 0o600)
    monkeypatch.setenv("QWQ_API_KEY", "sk-new")
    told = world.run(health)
    assert told.word == "Degraded"
    assert "status 401" in told.message
    assert "nothing is restarted for that" in told.message
    assert world.serving() == first
    world.change(settings={"all": {"environment": {"API_KEY_OF": "2026-11-28"}}})
    bad = world.push("20250723_1", {"p1": Faults(dies=1)})
    assert world.run(deploy, image=bad).word == "RolledBack"
    assert world.serving() == first
    assert world.run(deploy).completed
    assert world.serving() != first
    assert world.run(health).word == "Completed"


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"api_key": None}, "", "without a key: `api_key` in the file says"),
        ({}, "sk-another", "to the key of `api_key`"),
    ],
    ids=["none", "another"],
)
def test_a_refusal_says_what_it_has_to_do_with_the_key(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], key: str, says: str
) -> None:
    monkeypatch.setenv("QWQ_API_KEY", key)
    world.change(**changes)
    error = world.run(deploy).error
    assert isinstance(error, SmokeTestFailed)
    assert f'status 401: \'{{"error":"Unauthorized"}}\', {says}' in str(error)
    assert "sk-another" not in str(error)


def test_a_variable_that_is_not_set_is_told_before_a_host_is_asked(world: World) -> None:
    outcome = world.run(deploy)
    assert isinstance(outcome.error, InvalidInput)
    assert "api_key.environment: expected the variable QWQ_API_KEY" in str(outcome.error)
    assert not outcome.moments
    deployment = load_deployment(world.path)
    assert world.asked(hosts.past(deployment)).away == []  # who only looks needs none
    with pytest.raises(InvalidInput, match="QWQ_API_KEY"):
        world.asked(bench.measured(deployment, save=False))


async def test_a_block_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(kind: type[SecretFields], name: str, key: str) -> SecretFields:
        assert (name, key) == ("qwq", "api_key.credentials")
        return kind.model_validate({"value": KEY})

    monkeypatch.setattr(loading, "_load", load)
    read = await loading._api_key(ApiKey(credentials="qwq"))
    assert read
    assert read.get_secret_value() == KEY
    assert KEY not in repr(read)


@pytest.mark.parametrize("given", [{}, {"credentials": "a", "environment": "B"}])
def test_it_comes_from_one_place(world: World, given: dict[str, str]) -> None:
    world.change(api_key={"environment": None} | given)
    with pytest.raises(InvalidInput, match="expected either credentials or environment"):
        load_deployment(world.path)
