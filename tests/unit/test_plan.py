"""The plan names the generation by all that would run, and by nothing else."""

from dataclasses import replace
from typing import Any

import pytest

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
        fingerprint(image=example.IMAGE[:-1] + "1"),
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
    assert {name: list(host.containers) for name, host in made.hosts.items()} == {
        "a": ["p0", "p1", "c0"],
        "b": ["p2", "d0"],
    }
    for host in made.hosts.values():
        scripts = [f for f in host.files_of("launch") if f.mode == "0700"]
        assert {f.path for f in scripts} == {s.command[0] for s in host.containers.values()}
        assert [c.instance for c in host.commands] == list(host.containers)
        assert len(host.files_of("ranktable")) == 3
        assert {f.mode for f in host.files_of("ranktable")} == {"0644"}


def test_labels_say_what_a_container_is() -> None:
    made = example.plan({"image": "omni:20250721_1"})
    epoch = made.generation.partition("-")[0]
    assert made.container("d0").labels == {
        "pd-deploy.deployment": "qwq-3p1d",
        "pd-deploy.generation": made.generation,
        "pd-deploy.epoch": epoch,
        "pd-deploy.instance": "d0",
        "pd-deploy.role": "decode",
        "pd-deploy.ports": "9100,8100,5668",
        "pd-deploy.devices": "8,9,10,11,12,13,14,15",
        "pd-deploy.image": "omni:20250721_1",
    }
    assert made.container("c0").labels["pd-deploy.role"] == "proxy"
    assert made.container("c0").labels["pd-deploy.ports"] == "7000"
