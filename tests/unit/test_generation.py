"""Which generation is wanted, and what must stop before it can start."""

import pytest

from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.records import generations
from pd_deploy.records.generations import Generation

OURS = Generation(3, "0123abcd")
OLD = Generation(2, "89abcdef")
HOSTS = {"p0": "a", "p1": "a", "p2": "b", "d0": "b", "c0": "a"}
ROLES = {"p": "prefill", "d": "decode", "c": "proxy"}
PLANNED = {f"{name}_{OURS}": ROLES[name[0]] for name in HOSTS}


def state(name: str, status: str, generation: Generation = OURS) -> ContainerState:
    labels = {
        generations.GENERATION: str(generation),
        generations.INSTANCE: name,
        generations.ROLE: ROLES[name[0]],
    }
    full = f"{name}_{generation}"
    return ContainerState(full, full, labels, status, None, None, None, "image")


def stopping(ours: dict[str, str], old: dict[str, str] | None = None) -> set[str]:
    """Names of what must stop, by the states of our and the old generation's containers."""
    containers: dict[str, list[ContainerState]] = {"a": [], "b": []}
    for generation, states in ((OURS, ours), (OLD, old or {})):
        for name, status in states.items():
            containers[HOSTS[name]].append(state(name, status, generation))
    found = generations.to_stop(PLANNED, containers, lambda _: PLANNED)
    assert [host for host, s in found] == [HOSTS[s.labels[generations.INSTANCE]] for _, s in found]
    return {s.name for _, s in found}


def names(*instances: str, generation: Generation = OURS) -> set[str]:
    return {f"{instance}_{generation}" for instance in instances}


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("1-0123abcd", Generation(1, "0123abcd")),
        ("12-ffffffff", Generation(12, "ffffffff")),
        *((odd, None) for odd in ("0-0123abcd", "01-0123abcd", "1-0123ABCD", "1-0123abc", "x")),
        *((odd, None) for odd in ("", "1-0123abcd\n", "²-0123abcd", "-1-0123abcd", "1-0123abcde")),
    ],
)
def test_names_are_epoch_and_fingerprint(name: str, parsed: Generation | None) -> None:
    assert Generation.parse(name) == parsed
    if parsed:
        assert str(parsed) == name


def test_latest_counts_epochs_as_numbers_and_passes_over_other_names() -> None:
    assert generations.latest(
        ["9-0123abcd", "10-89abcdef", "lost+found", "2-ffffffff"]
    ) == Generation(10, "89abcdef")
    assert generations.latest(["x"]) is None


@pytest.mark.parametrize(
    ("found", "wanted", "desired"),
    [
        ([], "0123abcd", "1-0123abcd"),
        (["1-0123abcd"], "0123abcd", "1-0123abcd"),
        (["1-0123abcd"], "89abcdef", "2-89abcdef"),
        (["1-0123abcd", "2-89abcdef"], "0123abcd", "3-0123abcd"),  # back: a new epoch all the same
        (["2-89abcdef", "2-89abcdef", "1-0123abcd"], "89abcdef", "2-89abcdef"),
    ],
)
def test_same_fingerprint_keeps_the_generation(found: list[str], wanted: str, desired: str) -> None:
    assert str(generations.desired(found, wanted)) == desired


def test_what_serves_stays_though_a_younger_one_failed() -> None:
    found = ["1-0123abcd", "2-89abcdef"]
    assert str(generations.desired(found, "0123abcd", "1-0123abcd")) == "1-0123abcd"
    assert str(generations.desired(found, "89abcdef", "1-0123abcd")) == "2-89abcdef"
    assert str(generations.desired(found, "ffffffff", "1-0123abcd")) == "3-ffffffff"


def test_fingerprint_is_stable_hexadecimal() -> None:
    assert (
        generations.fingerprint("a") == generations.fingerprint("a") != generations.fingerprint("b")
    )
    assert Generation.parse(f"1-{generations.fingerprint('a')}")


def all_of(status: str, **but: str) -> dict[str, str]:
    return dict.fromkeys(HOSTS, status) | but


@pytest.mark.parametrize(
    ("ours", "failed", "expected"),
    [
        (all_of("running", p1="exited"), (), set()),
        (all_of("running", p1="exited"), ("p1",), set()),
        (all_of("running", d0="exited"), (), {"p2"}),  # its pod's other member
        (all_of("running"), ("p0",), {"p0"}),
        (all_of("running"), ("p2",), {"p2", "d0"}),
        (all_of("running"), ("c0",), {"c0"}),
        (all_of("running", p1="exited"), ("c0",), {"c0"}),
    ],
)
def test_what_stops_where_links_are_made_on_demand(
    ours: dict[str, str], failed: tuple[str, ...], expected: set[str]
) -> None:
    """Only what can't go on without a server that has ended, and what has failed."""
    containers: dict[str, list[ContainerState]] = {"a": [], "b": []}
    for name, status in ours.items():
        containers[HOSTS[name]].append(state(name, status))
    pod = names("p2", "d0")
    found = generations.to_stop(
        PLANNED, containers, lambda name: pod if name in pod else {name}, names(*failed)
    )
    assert {s.name for _, s in found} == names(*expected)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ({}, set()),
        (all_of("running"), set()),
        (all_of("created"), set()),
        (all_of("running", c0="created"), set()),
        (all_of("running", c0="exited"), set()),
        (all_of("exited"), set()),
        # a member ended: links are made once, so the whole set starts anew
        (all_of("running", d0="exited"), names("p0", "p1", "p2", "c0")),
        (all_of("running", p1="dead"), names("p0", "p2", "d0", "c0")),
        (all_of("running", p1="exited", c0="exited"), names("p0", "p2", "d0")),
        (all_of("created", d0="exited", p0="running"), names("p0")),
        # somebody removed a member
        ({k: "running" for k in HOSTS if k != "d0"}, names("p0", "p1", "p2", "c0")),
        # an interrupted start goes on; only the proxy must not stay open
        (all_of("created", d0="running"), set()),
        (all_of("created", c0="running"), names("c0")),
        (all_of("running", p2="created"), names("c0")),
        ({"c0": "running"}, names("c0")),
        (all_of("exited", c0="paused", p0="restarting"), names("c0", "p0")),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_stops_of_the_same_generation(ours: dict[str, str], expected: set[str]) -> None:
    assert stopping(ours) == expected


def test_all_that_runs_of_another_generation_stops() -> None:
    old = all_of("running", p1="exited", d0="paused")
    assert stopping({}, old) == names("p0", "p2", "d0", "c0", generation=OLD)
    assert stopping(all_of("running"), old) == names("p0", "p2", "d0", "c0", generation=OLD)


def test_instances_that_left_the_file_stop_with_their_generation() -> None:
    containers = {"a": [state("p9", "running", OLD)], "b": []}
    assert [s.name for _, s in generations.to_stop(PLANNED, containers, lambda _: PLANNED)] == [
        f"p9_{OLD}"
    ]
