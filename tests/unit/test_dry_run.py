"""What a dry run says it would do, from what the hosts said."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

import pytest

from pd_deploy.config.models import Deployment
from pd_deploy.errors import OutOfOrder
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.hosts.facts import Seen
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.hosts.login import Login
from pd_deploy.planning import actions
from pd_deploy.planning.plans import STAGES
from pd_deploy.records import generations
from pd_deploy.records.releases import Choice, Record
from pd_deploy.steps import surveying
from pd_deploy.steps.host_records import HostRecords
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import Addresses, ResolvedImage
from tests.unit import example

OLD = "1-0123abcd"


def state(name: str, host_generation: str, status: str) -> ContainerState:
    role = {"p": "prefill", "d": "decode", "c": "proxy"}[name[0]]
    labels = {
        generations.GENERATION: host_generation,
        generations.INSTANCE: name,
        generations.ROLE: role,
    }
    full = f"omni-infer-{role}_{name}_{host_generation}"
    began = datetime(2025, 1, 1, tzinfo=UTC)
    return ContainerState(full, full, labels, status, None, began, None, "image")


def rollout(
    states: dict[str, str],
    *,
    known: list[str] | None = None,
    name: str = "qwq-3p1d",
    listening: Sequence[int] = (7000,),
) -> Rollout:
    """A rollout whose hosts hold containers in these states, and these generations."""
    of = example.service({"name": name})
    session = Session(of, Hosts(Host(n, e.address, Login()) for n, e in of.hosts.items()))
    known = known or []
    wanted = example.plan({"name": name}, generations=known).generation
    states = {
        host: HostState(
            host=host,
            interface=example.INTERFACE,
            architecture="aarch64",
            docker_version="27.0",
            docker_root="/var/lib/docker",
            containers=tuple(
                state(n, known[0] if known and known[0] != wanted else wanted, status)
                for n, status in states.items()
                if (session.topology.host_of(n) if n in session.topology.names else "b") == host
            ),
            records=HostRecords(Record(), (), frozenset(known), frozenset(known), True),
            listening=frozenset(listening),
            tree=tree(of, known)[host] if known else {},
        )
        for host in of.hosts
    }
    addresses = [Addresses(host, found) for host, found in example.addresses(of).items()]
    image = ResolvedImage(Choice(of.image, None, "the file's own"), example.IMAGE)
    return surveying.planned(session, list(states.values()), addresses, image, "a test")


def tree(of: Deployment, known: list[str]) -> dict[str, dict[str, Seen]]:
    """The files of a generation as they were planned."""
    plan = example.plan({"name": of.name}, generations=known)
    return {
        name: {
            file.path: Seen(False, int(file.mode, 8), sha256(file.content.encode()).hexdigest())
            for file in host.files
        }
        for name, host in plan.hosts.items()
        if plan.generation in known
    } or {name: {} for name in plan.hosts}


def verbs(of: Rollout, stages: Sequence[str] = STAGES) -> list[tuple[str, str, str]]:
    return [
        (host, action.verb, action.subject.rpartition("/")[2])
        for host, planned in of.with_actions(stages).hosts.items()
        for action in planned.actions
    ]


ALL = ("p0", "p1", "p2", "d0", "c0")


@pytest.mark.parametrize("name", ["qwq-3p1d", "p0"])
def test_on_empty_hosts_everything_is_made(name: str) -> None:
    of = rollout({}, name=name)
    found = verbs(of)
    made = list(of.plan.roles)
    assert [subject for _, verb, subject in found if verb == "create"] == made
    assert [subject for _, verb, subject in found if verb == "start"] == made
    assert sum(subject == "start.sh" for _, _, subject in found) == 5
    assert sum(subject.endswith(".json") for _, _, subject in found) == 6
    assert [verb for _, verb, _ in found if verb == "stop"] == []


def test_where_all_runs_there_is_nothing_to_do() -> None:
    known = [rollout({}).plan.generation]
    of = rollout(dict.fromkeys(ALL, "running"), known=known)
    assert verbs(of) == []
    assert actions.as_markdown(of.with_actions(STAGES)).count("Nothing to do.") == 2


def test_a_file_that_was_changed_by_hand_is_written_again() -> None:
    known = [rollout({}).plan.generation]
    of = rollout(dict.fromkeys(ALL, "running"), known=known)
    for host, planned in of.plan.hosts.items():
        seen = of.states[host].tree
        for file in planned.files:
            for change in ({"sha256": "0" * 64}, {"mode": 0o755}, {"is_directory": True}, None):
                changed = (
                    {**seen, file.path: replace(seen[file.path], **change)}
                    if change
                    else {path: found for path, found in seen.items() if path != file.path}
                )
                state = replace(of.states[host], tree=changed)
                again = replace(of, states={**of.states, host: state})
                assert verbs(again) == [(host, "write", file.path.rpartition("/")[2])]
                assert again.changes


def test_a_proxy_whose_port_is_closed_is_opened() -> None:
    known = [rollout({}).plan.generation]
    of = rollout(dict.fromkeys(ALL, "running"), known=known, listening=())
    assert verbs(of) == [("a", "open", "port 7000")]


def test_death_of_one_server_restarts_the_set() -> None:
    known = [rollout({}).plan.generation]
    of = rollout(dict.fromkeys(ALL, "running") | {"d0": "exited"}, known=known)
    found = [(verb, subject.split("_")[1]) for _, verb, subject in verbs(of) if verb != "open"]
    assert sorted(found) == sorted(
        [("stop", name) for name in ALL if name != "d0"] + [("start", name) for name in ALL]
    )
    assert of.to_restart() == (["c0"], ["p0", "p1", "p2"])


def test_old_generation_stops_and_the_new_one_is_made() -> None:
    of = rollout(dict.fromkeys(ALL, "running"), known=[OLD])
    found = verbs(of)
    assert sum(verb == "stop" and subject.endswith(OLD) for _, verb, subject in found) == 5
    assert sum(verb == "start" and OLD not in subject for _, verb, subject in found) == 5
    with pytest.raises(OutOfOrder, match=r"run the stage `cleanup` first"):
        of.to_restart()


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["cleanup"], {"stop"}),
        (["launch"], {"write", "create"}),
        (["ranktable"], {"write"}),
        (["proxy"], {"start"}),
        (["server"], {"stop", "start", "open"}),
    ],
)
def test_stages_do_their_own_part(stages: list[str], expected: set[str]) -> None:
    of = rollout(dict.fromkeys(ALL, "running"), known=[OLD])
    assert {verb for _, verb, _ in verbs(of, stages)} == expected


def test_page_groups_by_host() -> None:
    of = rollout({})
    page = actions.as_markdown(of.with_actions(STAGES))
    assert page.count("## a (10.0.0.1)") == page.count("## b (10.0.0.2)") == 1
    assert f"- create `{of.plan.instance('d0').container.name}`" in page


def test_cleanup_looks_at_instances_that_left_the_file_too() -> None:
    of = rollout({"c9": "running", "p9": "running"}, known=[OLD])
    assert of.to_clean_up() == (["c0", "c9"], ["p0", "p1", "p2", "d0", "p9"])


def test_a_proxy_that_has_to_stop_first_is_not_prepared_before_the_cut_over() -> None:
    """The container is the same one; a new one is prepared while the old one serves."""
    serving = {"p0": "running", "p1": "running", "p2": "exited", "d0": "running", "c0": "running"}
    assert not rollout(serving).may_prepare_early("c0")
    assert rollout(serving, known=["1-00000000"]).may_prepare_early("c0")
    assert rollout({}).may_prepare_early("c0")
