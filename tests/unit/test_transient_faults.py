"""Transient faults at any call of a run on hosts in memory: the run goes on as if without."""

import re
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_deploy.errors import ConnectionDropped, HostUnreachable, PdDeployError, TimedOut
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from tests.memory.calls import Moment
from tests.memory.world import World
from tests.samples import ALL, sampled

FLOWS = ("deploy", "upgrade", "rollback")
KINDS: tuple[type[PdDeployError], ...] = (ConnectionDropped, HostUnreachable, TimedOut)


def can_fail(moment: Moment) -> bool:
    """Whether a transient fault just here must not be noticed: anywhere but where a lease is given
    back, which is tried once; see below."""
    return moment.what != "lease release"


@cache
def before(what: str) -> tuple[World, Any, dict[str, Any], int]:
    """Hosts before a run, the run, and how many moments of it can fail."""
    world, flow, parameters = World(Path(mkdtemp())), deploy, dict[str, Any]()
    if what != "deploy":
        world.deploy()
        parameters = {"image": world.push("20250725_1")}
    if what == "rollback":
        assert world.shared_run(deploy, **parameters).completed
        flow, parameters = rollback, {}
    outcome = world.twin().shared_run(flow, **parameters)
    assert outcome.completed, outcome.error
    count = sum(map(can_fail, outcome.moments))
    assert count > 300
    return world, flow, parameters, count


@settings(max_examples=200 if ALL else 9, derandomize=True, deadline=None, database=None)
@given(
    what=st.sampled_from(FLOWS),
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=2, unique=True),
    kind=st.sampled_from(KINDS),
)
def test_one_or_two_transient_faults_change_nothing_of_the_outcome(
    what: str, places: list[float], kind: type[PdDeployError]
) -> None:
    world, flow, parameters, count = before(what)
    twin, passed, failed = world.twin(), 0, list[Moment]()
    numbers = {int(place * count) for place in places}

    def watch(moment: Moment) -> None:
        nonlocal passed
        if can_fail(moment):
            passed += 1
            if passed - 1 in numbers:
                failed.append(moment)
                raise kind(f"lost {moment}", host=moment.host)

    outcome = twin.run(flow, watch=watch, **parameters)
    assert failed
    assert outcome.completed, f"{[str(one) for one in failed]}: {outcome.error}"
    twin.assert_coherent()


OF_THE_SMOKE_TEST = re.compile(r" \S+:\d+/(v1/completions|v1/chat/completions|metrics)$")


def test_a_connection_lost_in_the_smoke_test_is_no_answer_of_the_service() -> None:
    """At places that are asked, by each kind in turn: the upgrade goes on, and its image is not
    to blame."""
    world, flow, parameters, _ = before("upgrade")
    asked = dict[str, Moment]()

    def note(moment: Moment) -> None:
        if OF_THE_SMOKE_TEST.search(moment.what):
            asked[f"{moment.what} {moment.after}"] = moment

    assert world.twin().run(flow, watch=note, **parameters).completed
    assert len(asked) > 15
    for lost, kind in zip(sampled(list(asked.values()), 3), cycle(KINDS), strict=False):
        twin, raised = world.twin(), list[Exception]()

        def lose(
            moment: Moment,
            lost: Moment = lost,
            kind: type[PdDeployError] = kind,
            raised: list[Exception] = raised,
        ) -> None:
            if not raised and (moment.what, moment.after) == (lost.what, lost.after):
                raised.append(kind(f"lost {moment}", host=moment.host))
                raise raised[0]

        assert twin.run(flow, watch=lose, **parameters).completed, str(lost)
        assert raised
        twin.assert_coherent()
        assert not twin.record().quarantine


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_that_could_not_be_given_back_keeps_the_next_run_only_until_it_is_old(
    kind: type[PdDeployError],
) -> None:
    world, flow, parameters, _ = before("upgrade")
    twin = world.twin()

    def watch(moment: Moment) -> None:
        if moment.what == "lease release":
            raise kind(f"lost {moment}", host=moment.host)

    assert twin.run(flow, watch=watch, **parameters).completed
    assert twin.run(rollback).completed
    twin.assert_coherent()
