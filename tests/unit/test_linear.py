"""The cost of a run grows with its hosts and no faster: counted, not timed, on hosts in memory."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from cProfile import Profile
from pathlib import Path
from types import CodeType
from unittest import mock

import pytest

from demo import fleet
from pd_deploy.flows.deploy import deploy
from pd_deploy.lab.lifecycle import host_names
from tests.memory import world as memory
from tests.memory.world import NAME, World

ROOT = str(Path(__file__).parents[2])
ROOMS = tuple(f"{ROOT}/{room}/" for room in ("pd_deploy", "flows", "tasks"))
HOSTS = (2, 4, 8)
SLACK = 8
"""Calls that one function may have beyond: a decode on one host knows shorter ways."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count calls of each of our functions, and tasks of Prefect with what each waits for."""
    counts: Counter[str] = Counter()
    run_in_place = memory._run_in_place

    async def run(*args: object, wait_for: list[object], **kwargs: object) -> object:
        counts["tasks"] += 1
        counts["edges"] += len(wait_for)
        return await run_in_place(*args, **kwargs)

    calls = Profile()
    with mock.patch.object(memory, "_run_in_place", run):
        calls.enable()
        try:
            yield counts
        finally:
            calls.disable()
            for entry in calls.getstats():
                code = entry.code
                if isinstance(code, CodeType) and code.co_filename.startswith(ROOMS):
                    line = f"{code.co_filename}:{code.co_firstlineno} {code.co_qualname}"
                    counts[line.removeprefix(ROOT)] += entry.callcount


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Counter[str]]]:
    """By kind of run, what it costs on so many hosts: the numbers of calls, by what is called."""
    costs: dict[str, list[Counter[str]]] = {"cold": [], "nothing": [], "upgrade": []}
    for hosts in (HOSTS[0], *HOSTS):  # the first of them fills the caches
        addresses = {name: f"10.0.0.{i}" for i, name in enumerate(host_names(hosts), start=1)}
        world = World(tmp_path_factory.mktemp("fleet"), addresses)
        document = fleet.document(addresses, decode_devices=1)
        world.change(**document | {"name": NAME, "extends": world.document["extends"]})
        for kind, of_kind in costs.items():
            if kind == "upgrade":
                world.change(settings={"all": {"environment": {"CHANGED": "1"}}})
            with counted() as counts:
                outcome = world.run(deploy)
            assert outcome.completed, outcome.error
            counts["moments on hosts"] = len(outcome.moments)
            of_kind.append(counts)
    return {kind: of_kind[1:] for kind, of_kind in costs.items()}


@pytest.mark.parametrize("kind", ["cold", "nothing", "upgrade"])
def test_twice_the_hosts_cost_twice_as_much_more_at_most(
    costs: dict[str, list[Counter[str]]], kind: str
) -> None:
    few, some, many = costs[kind]
    assert some["tasks"] > few["tasks"]
    assert {
        what: (few[what], some[what], count)
        for what, count in many.items()
        if count - some[what] > 2 * (some[what] - few[what]) + SLACK
    } == {}


@pytest.mark.parametrize("kind", ["cold", "nothing", "upgrade"])
def test_the_graph_of_many_hosts_has_two_edges_for_each_task(
    costs: dict[str, list[Counter[str]]], kind: str
) -> None:
    assert costs[kind][-1]["edges"] <= 2 * costs[kind][-1]["tasks"]
