"""The plan names the generation by all that would run, and by nothing else."""

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from pd_deploy.config.load import load_deployment
from pd_deploy.planning.plans import Plan
from tests.unit import example


def fingerprint(changes: dict[str, Any] | None = None, **given: Any) -> str:
    return example.plan(changes, **given).generation.partition("-")[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"all": {"environment": {"X": 1}}}},
        {"decode": {"d0": {"environment": {"X": 1}}}},
        {"prefill": {"p0": {"arguments": {"seed": 1}}}},
        {"prefill": {"p2": None}},
        {"hosts": {"b": "10.0.0.3"}},
        {"model": {"served_name": "other"}},
        {"proxy": {"c0": {"port": 7001}}},
        {"container": {"shm_size": "1g"}},
        {"paths": {"logs": "/logs"}},
    ],
    ids=str,
)
def test_fingerprint_changes_with_what_would_run(changes: dict[str, Any]) -> None:
    assert fingerprint(changes) != fingerprint()


def test_fingerprint_changes_with_digest_interface_and_device_address() -> None:
    of = example.service()
    known = example.facts(of)
    moved = dict(known["b"].device_addresses) | {8: "192.168.9.9"}
    others = {
        fingerprint(pinned_image=example.IMAGE[:-1] + "1"),
        fingerprint(known=example.facts(of, "ens3")),
        fingerprint(known=known | {"b": replace(known["b"], device_addresses=moved)}),
        fingerprint(),
    }
    assert len(others) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"image": "other.example/omni:20250721_1"},
        {"registry": {"host": "10.0.0.9:5000", "credentials": "other"}},
        {"ssh": {"user": "me", "port": 2222, "credentials": "other"}},
        {"gates": {"ready": 5}},
        {"smoke": {"prompt": "hi"}},
        {"pull": "never"},
    ],
    ids=str,
)
def test_fingerprint_stays_with_what_does_not_run(changes: dict[str, Any]) -> None:
    assert fingerprint(changes) == fingerprint()


def test_fingerprint_does_not_depend_on_the_epoch() -> None:
    first = example.plan()
    assert example.plan(generations=[first.generation]).generation == first.generation
    later = example.plan(generations=[first.generation, "7-0123abcd"])
    assert later.generation == first.generation.replace("1-", "8-", 1)


FINGERPRINTS: dict[str, list[str]] = json.loads(
    (example.ROOT / "tests/data/fingerprints.json").read_text()
)


@pytest.mark.parametrize("path", sorted(example.FILE.parent.glob("*.yaml")), ids=lambda p: p.stem)
def test_fingerprints_are_those_of_the_version_before(path: Path) -> None:
    """One that changes restarts every such service at the next deploy: say so in the changelog."""
    of = load_deployment(path)
    made = example.made(of)
    fingerprint = made.plan.generation.partition("-")[2]
    assert [fingerprint, made.servers_fingerprint] == FINGERPRINTS[path.stem]


def test_plan_survives_json() -> None:
    made = example.plan()
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_every_path_lies_in_the_generations_own_directories() -> None:
    made = example.plan()
    state = f"/var/lib/pd-deploy/qwq-3p1d/{made.generation}/"
    logs = f"/data/log_path/qwq-3p1d/{made.generation}/"
    for host in made.hosts.values():
        assert {d for d in host.directories if not d.startswith((state, logs))} == set()
        for file in host.files:
            assert file.path.startswith(state)
            assert file.path.rpartition("/")[0] in host.directories


def test_each_host_gets_what_it_runs() -> None:
    made = example.plan()
    assert {name: list(host.instances) for name, host in made.hosts.items()} == {
        "a": ["p0", "p1", "c0"],
        "b": ["p2", "d0"],
    }
    for host in made.hosts.values():
        for name, instance in host.instances.items():
            assert instance.container.labels["pd-deploy.instance"] == name
            assert instance.start_script.path == instance.container.command[0]
            assert instance.start_script.mode == "0700"
        assert host.ranktables
        assert len(host.ranktables.files) == 3
        assert {file.mode for file in host.ranktables.files} == {"0644"}


def test_each_instance_owns_what_carries_its_name() -> None:
    for host in example.plan().hosts.values():
        for name, instance in host.instances.items():
            script = PurePosixPath(instance.start_script.path)
            assert str(script.parent) == instance.directory
            assert {PurePosixPath(path).name for path in instance.directories} == {name}


def test_labels_say_what_a_container_is() -> None:
    made = example.plan({"image": "omni:20250721_1"})
    epoch = made.generation.partition("-")[0]
    assert made.instance("d0").container.labels == {
        "pd-deploy.deployment": "qwq-3p1d",
        "pd-deploy.generation": made.generation,
        "pd-deploy.epoch": epoch,
        "pd-deploy.instance": "d0",
        "pd-deploy.role": "decode",
        "pd-deploy.ports": "9100,8100,5668",
        "pd-deploy.devices": "8,9,10,11,12,13,14,15",
        "pd-deploy.image": "omni:20250721_1",
    }
    assert made.instance("c0").role == "proxy"
    assert made.instance("c0").ports == {7000}
