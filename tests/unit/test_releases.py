"""What became of the generations: the record, what is kept, and what the next plan makes of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pd_deploy.config.load import load_deployment
from pd_deploy.planning.plans import HostPlan, Made
from pd_deploy.records import releases
from pd_deploy.records.releases import (
    History,
    HostAccess,
    Outcome,
    Quarantined,
    Record,
    Release,
    Result,
)
from pd_deploy.steps.host_records import Saved
from tests.unit import example

ONE, TWO, THREE = "1-0123abcd", "2-89abcdef", "3-ffffffff"
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
DIGEST = "sha256:" + "0" * 64
A, B = HostAccess(name="a", address="10.0.0.1"), HostAccess(name="b", address="10.0.0.2")
BAD = Quarantined(image="omni:2", when=NOW, reason="it dies")
SERVERS = ("p0", "p1", "p2", "d0")


def release(generation: str, **but: Any) -> Release:
    given: dict[str, Any] = {
        "generation": generation,
        "servers": generation,
        "servers_fingerprint": "0123abcd",
        "chosen_image": "omni:1",
        "pinned_image": example.IMAGE,
        "file_image": "omni:1",
        "hosts": {"a": A, "b": B},
        "logs": f"/data/log_path/x/{generation}",
        "created": NOW,
        "started_by": "a run",
    }
    return Release(**given | but)


def outcome(result: Result = "good", minutes: int = 0, reason: str = "") -> Outcome:
    return Outcome(result=result, when=NOW + timedelta(minutes=minutes), by="a run", reason=reason)


def history(
    *known: Release, serving: str | None = None, found: tuple[str, ...] = (), **outcomes: Outcome
) -> History:
    """A history; outcomes by `g<epoch>`."""
    names = {f"g{one.generation.partition('-')[0]}": one.generation for one in known}
    became = {names[key]: one for key, one in outcomes.items()}
    return releases.merge([Record(sequence=1, serving=serving, outcomes=became)], known, found)


class TestRecord:
    def test_promotion_makes_a_generation_serve_and_good(self) -> None:
        record = Record().promoted(ONE, NOW, "a run")
        assert (record.serving, record.sequence) == (ONE, 1)
        assert record.outcomes == {ONE: outcome()}

    def test_promotion_of_what_serves_changes_nothing(self) -> None:
        record = Record().promoted(ONE, NOW, "a run")
        assert record.promoted(ONE, NOW + timedelta(days=1), "another run") is record

    def test_promotion_of_an_older_generation_makes_it_the_last_promoted(self) -> None:
        record = Record().promoted(ONE, NOW, "x").promoted(TWO, NOW, "x")
        later = NOW + timedelta(minutes=1)
        again = record.promoted(ONE, later, "x")
        assert (again.serving, again.outcomes[ONE].when, again.sequence) == (ONE, later, 3)

    def test_a_good_generation_stays_good_whatever_a_later_attempt_came_to(self) -> None:
        record = Record().promoted(ONE, NOW, "x")
        assert record.ended(ONE, outcome("failed")) is record
        assert record.ended(TWO, outcome("failed")).outcomes[TWO].result == "failed"

    def test_a_failed_generation_may_become_good(self) -> None:
        record = Record().ended(ONE, outcome("failed")).promoted(ONE, NOW, "x")
        assert record.outcomes[ONE].result == "good"

    def test_the_record_does_not_grow_with_every_bad_build(self) -> None:
        record = Record()
        for day in range(150):
            why = BAD.model_copy(update={"when": NOW + timedelta(days=day)})
            record = record.quarantined(f"sha256:{day:064x}", why)
        assert len(record.quarantine) == releases.QUARANTINE
        assert f"sha256:{149:064x}" in record.quarantine
        assert f"sha256:{0:064x}" not in record.quarantine

    def test_images_go_into_quarantine_and_out_of_it(self) -> None:
        record = Record().quarantined(DIGEST, BAD)
        assert record.quarantine == {DIGEST: BAD}
        assert record.released("sha256:1") is record
        assert record.released(DIGEST).quarantine == {}

    def test_hosts_are_remembered_by_address_until_they_are_left(self) -> None:
        record = Record().on([A, B])
        assert record.on([A]) is record
        moved = record.on([A.model_copy(update={"port": 2222})])
        assert moved.hosts[A.address].port == 2222
        assert moved.left([A.address]).hosts == {B.address: B}
        assert record.left(["10.9.9.9"]) is record

    def test_removed_generations_are_forgotten(self) -> None:
        record = Record().promoted(ONE, NOW, "x").promoted(TWO, NOW, "x")
        assert set(record.without([ONE, THREE]).outcomes) == {TWO}
        assert record.without([THREE]) is record

    def test_survives_json(self) -> None:
        record = Record().on([A]).promoted(ONE, NOW, "x").quarantined(DIGEST, BAD)
        assert Record.model_validate_json(record.model_dump_json()) == record


Change = Callable[[Record], Record]
NAMES = st.sampled_from([ONE, TWO, THREE])
REPEATABLE: st.SearchStrategy[Change] = st.one_of(
    NAMES.map(lambda name: lambda record: record.promoted(name, NOW, "x")),
    NAMES.map(lambda name: lambda record: record.without([name])),
    st.sampled_from([A, B]).map(lambda place: lambda record: record.on([place])),
    st.sampled_from([A, B]).map(lambda place: lambda record: record.left([place.address])),
    st.just(lambda record: record.released(DIGEST)),
)
CHANGES: st.SearchStrategy[Change] = st.one_of(
    REPEATABLE,
    NAMES.map(lambda name: lambda record: record.ended(name, outcome("failed"))),
    st.just(lambda record: record.quarantined(DIGEST, BAD)),
)


def after(changes: list[Change]) -> Record:
    record = Record()
    for change in changes:
        record = change(record)
    return record


@given(st.lists(CHANGES), CHANGES)
def test_each_change_has_the_next_sequence_and_no_change_is_the_same_record(
    past: list[Change], change: Change
) -> None:
    before = after(past)
    changed = change(before)
    assert changed is before or changed.sequence == before.sequence + 1


@given(st.lists(CHANGES), REPEATABLE)
def test_a_change_that_was_made_is_not_made_again(past: list[Change], change: Change) -> None:
    once = change(after(past))
    assert change(once) is once


class TestMerge:
    @given(st.permutations([Record(sequence=n, serving=f"{n}-0123abcd") for n in range(1, 5)]))
    def test_the_highest_sequence_wins_whichever_host_has_it(self, records: list[Record]) -> None:
        assert releases.merge(records, (), ()).record.sequence == 4

    def test_hosts_that_know_nothing_make_an_empty_history(self) -> None:
        past = releases.merge([Record(), Record()], (), ())
        assert (past.record, past.serving, past.good, past.before()) == (Record(), None, [], None)
        assert past.kept(3) == set()

    def test_names_that_are_no_generations_are_passed_over(self) -> None:
        past = releases.merge((), [release(ONE)], ["lost+found", TWO])
        assert past.generations == {ONE, TWO}


class TestHistory:
    def test_good_ones_come_in_the_order_of_their_promotion(self) -> None:
        past = history(release(ONE), release(TWO), release(THREE), serving=ONE,
                       g1=outcome(minutes=2), g2=outcome(), g3=outcome("failed"))  # fmt: skip
        assert past.good == [TWO, ONE]
        assert past.before() == TWO

    def test_a_good_one_whose_release_is_lost_is_nowhere_to_go_back_to(self) -> None:
        record = Record().promoted(ONE, NOW, "x").promoted(TWO, NOW, "x")
        past = releases.merge([record], [release(TWO)], [])
        assert past.good == [TWO]
        assert past.before() is None

    def test_a_written_release_is_known(self) -> None:
        past = history(release(ONE)).with_release(release(TWO))
        assert set(past.releases) == past.generations == {ONE, TWO}

    def test_what_serves_the_last_good_ones_and_the_youngest_are_kept(self) -> None:
        names = [f"{epoch}-0123abcd" for epoch in range(1, 7)]
        past = history(*map(release, names), serving=names[4], g1=outcome(minutes=1),
                       g2=outcome(minutes=2), g3=outcome("failed", 3), g4=outcome(minutes=4),
                       g5=outcome(minutes=5), g6=outcome("failed", 6))  # fmt: skip
        assert past.kept(1) == {names[3], names[4], names[5]}
        assert past.kept(2) == {names[1], names[3], names[4], names[5]}

    def test_the_youngest_is_kept_though_only_its_name_is_found(self) -> None:
        past = history(release(ONE), serving=ONE, found=("10-0123abcd", "9-0123abcd"), g1=outcome())
        assert past.kept(1) == {ONE, "10-0123abcd"}

    def test_a_generation_whose_servers_a_kept_one_runs_is_kept(self) -> None:
        """Of three changes of the proxy alone, the first generation's servers serve them all."""
        names = [f"{epoch}-0123abcd" for epoch in range(1, 5)]
        past = history(*(release(name, servers=names[0]) for name in names), serving=names[3],
                       **{f"g{n}": outcome(minutes=n) for n in range(1, 5)})  # fmt: skip
        assert past.kept(1) == {names[0], names[2], names[3]}


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Releases that run their own servers or those of an earlier one, and what became of them."""
    known: list[Release] = []
    record = Record()
    for epoch in range(1, draw(st.integers(1, 8)) + 1):
        name = f"{epoch}-{epoch:08x}"
        servers = draw(st.sampled_from([name, *(one.servers for one in known)]))
        known.append(release(name, servers=servers))
        when = NOW + timedelta(minutes=epoch)
        if draw(st.booleans()):
            record = record.promoted(name, when, "x")
        elif draw(st.booleans()):
            record = record.ended(name, outcome("failed"))
    return releases.merge([record], known, ())


@given(histories(), st.integers(1, 4))
def test_pruning_never_takes_what_serves_may_serve_again_or_is_run(
    past: History, count: int
) -> None:
    kept = past.kept(count)
    assert kept <= past.generations
    assert {past.record.serving, past.before()} - {None} <= kept
    assert set(past.good[-count:]) <= kept
    assert max(past.generations, key=lambda name: int(name.partition("-")[0])) in kept
    assert {past.releases[name].servers for name in kept} <= kept


@given(histories(), st.integers(1, 4))
def test_pruning_again_removes_nothing_more(past: History, count: int) -> None:
    kept = past.kept(count)
    left = [one for name, one in past.releases.items() if name in kept]
    record = past.record.without(past.generations - kept)
    assert releases.merge([record], left, ()).kept(count) == kept


@pytest.mark.parametrize(
    ("file_image", "asked", "serving", "expected"),
    [
        ("omni:1", "omni:9", release(ONE), ("omni:9", None, "the run names it")),
        ("omni:1", None, None, ("omni:1", None, "the file's own")),
        ("omni:2", None, release(ONE), ("omni:2", None, f"the file's own, changed since {ONE}")),
        ("omni:1", None, release(ONE), ("omni:1", DIGEST, f"the file's own, as {ONE}")),
        (
            "omni:1",
            None,
            release(ONE, chosen_image="omni:5"),
            ("omni:5", DIGEST, f"promoted with {ONE}; the file's is older"),
        ),
    ],
    ids=["named", "first", "file changed", "as it serves", "promoted"],
)
def test_which_image_a_run_takes(
    file_image: str, asked: str | None, serving: Release | None, expected: tuple[str, Any, str]
) -> None:
    choice = releases.choose(file_image, asked, serving)
    assert (choice.chosen_image, choice.digest, choice.rule) == expected


class TestTable:
    def test_the_youngest_comes_first_by_its_epoch(self) -> None:
        past = history(release("9-0123abcd"), release("10-0123abcd"), release(ONE))
        rows = releases.table(past)
        assert [row["generation"] for row in rows] == ["10-0123abcd", "9-0123abcd", ONE]

    def test_a_row_says_what_became_of_a_release(self) -> None:
        past = history(release(ONE), release(TWO), release(THREE), serving=ONE, g1=outcome(),
                       g2=outcome("failed", 5, "ready d0: it  died\nits last lines:"))  # fmt: skip
        three, two, one = releases.table(past)
        assert (three["result"], three["ended"], three["cause"]) == ("unfinished", "", "")
        assert two == {
            "generation": TWO,
            "created": "2026-01-01 12:00:00",
            "image": "omni:1",
            "digest": "sha256:000000000000",
            "contract": "",
            "changed": "",
            "started by": "a run",
            "result": "failed",
            "ended": "2026-01-01 12:05:00",
            "cause": "ready d0: it died",
        }
        assert one["result"] == "serving"

    @pytest.mark.parametrize(
        ("running", "is_closed", "result"),
        [
            ({ONE, TWO}, False, "serving"),
            ({TWO}, False, "promoted, does not run"),
            ({ONE}, False, "promoted, does not run"),
            (set(), True, "promoted, does not run"),
            ({ONE, TWO}, True, "promoted, does not serve"),
            (None, False, "serving"),
            (None, True, "promoted, does not serve"),
        ],
    )
    def test_what_serves_is_told_from_what_was_only_promoted(
        self, running: set[str] | None, is_closed: bool, result: str
    ) -> None:
        """By what runs, its servers of an earlier generation too, and by whether clients get in."""
        past = history(release(ONE), release(TWO, servers=ONE), serving=TWO, g1=outcome())
        record = past.record.closing(NOW) if is_closed else past.record
        two, one = releases.table(replace(past, record=record), running)
        assert (two["result"], one["result"]) == (result, "good")

    def test_quarantine_of_the_image_is_said(self) -> None:
        record = Record().ended(ONE, outcome("failed")).quarantined(DIGEST, BAD)
        (row,) = releases.table(releases.merge([record], [release(ONE)], ()))
        assert row["result"] == "failed, image quarantined"

    def test_a_long_reason_is_cut(self) -> None:
        (row,) = releases.table(history(release(ONE), g1=outcome("failed", reason="x" * 500)))
        assert row["cause"] == "x" * 199 + "…"


PROXY = {"proxy": {"c0": {"core_num": 2}}}
ENGINE = {"settings": {"all": {"environment": {"X": 1}}}}


def example_made(changes: dict[str, Any] | None, past: History) -> Made:
    return example.made(example.service(changes), past)


def attempted(of: Made, past: History) -> History:
    """The history once a plan was begun."""
    return past.with_release(
        release(
            of.plan.generation,
            servers=of.plan.servers,
            servers_fingerprint=of.servers_fingerprint,
        )
    )


def served(of: Made, past: History) -> History:
    """The history once a plan serves."""
    tried = attempted(of, past)
    record = tried.record.promoted(of.plan.generation, NOW, "a run")
    return History(record, tried.releases, tried.generations)


class TestPlans:
    def test_a_change_of_the_proxy_alone_keeps_the_servers_as_they_are(self) -> None:
        first = example_made(None, example.past())
        past = served(first, example.past())
        second = example_made(PROXY, past)
        assert second.plan.generation.startswith("2-")
        assert second.plan.servers == first.plan.generation
        assert second.servers_fingerprint == first.servers_fingerprint
        for name in SERVERS:
            assert second.plan.instance(name) == first.plan.instance(name)
            assert second.plan.instance(name).generation == first.plan.generation
        proxy = second.plan.instance("c0")
        assert proxy.container.name.endswith(second.plan.generation)
        assert proxy.generation == second.plan.generation

    def test_files_of_those_servers_stay_where_they_are(self) -> None:
        """Only the proxy's lie in directories of the new generation."""
        first = example_made(None, example.past())
        second = example_made(PROXY, served(first, example.past()))
        for name, host in second.plan.hosts.items():
            assert host.ranktables == first.plan.hosts[name].ranktables
            new = [path for path in host.directories if second.plan.generation in path]
            assert new == (host.instances["c0"].directories if "c0" in host.instances else [])

    def test_a_second_change_of_the_proxy_goes_on_with_the_first_servers(self) -> None:
        first = example_made(None, example.past())
        past = served(first, example.past())
        past = served(example_made(PROXY, past), past)
        third = example_made({"proxy": {"c0": {"core_num": 3}}}, past)
        assert third.plan.generation.startswith("3-")
        assert third.plan.servers == first.plan.generation

    def test_a_change_of_an_engine_moves_everything(self) -> None:
        first = example_made(None, example.past())
        second = example_made(ENGINE, served(first, example.past()))
        assert second.plan.servers == second.plan.generation != first.plan.generation
        assert second.servers_fingerprint != first.servers_fingerprint
        assert {second.plan.instance(name).generation for name in (*SERVERS, "c0")} == {
            second.plan.generation
        }

    def test_servers_of_a_generation_that_never_served_are_not_taken_over(self) -> None:
        first = example_made(None, example.past())
        second = example_made(PROXY, attempted(first, example.past()))
        assert second.plan.servers == second.plan.generation

    @pytest.mark.parametrize("became", [attempted, served])
    def test_a_known_generation_runs_the_servers_that_it_recorded(
        self, became: Callable[[Made, History], History]
    ) -> None:
        """Tried again after a failure, or run again while it serves."""
        first = example_made(None, example.past())
        past = served(first, example.past())
        second = example_made(PROXY, past)
        assert example_made(PROXY, became(second, past)) == second

    def test_what_a_generation_recorded_counts_more_than_what_serves(self) -> None:
        first = example_made(None, example.past())
        past = served(first, example.past())
        second = example_made(PROXY, past).plan.generation
        past = past.with_release(release(second, servers=second))
        assert example_made(PROXY, past).plan.servers == second

    @pytest.mark.parametrize("changes", [None, PROXY, ENGINE], ids=["same", "proxy", "engine"])
    def test_a_fingerprint_does_not_depend_on_the_past(self, changes: Any) -> None:
        past = served(example_made(None, example.past()), example.past())
        with_past = example_made(changes, past).plan.generation
        without = example_made(changes, example.past()).plan.generation
        assert with_past.partition("-")[2] == without.partition("-")[2]


@pytest.mark.parametrize("path", sorted(example.FILE.parent.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_saved_generation_comes_back_as_it_was(path: Path) -> None:
    of = load_deployment(path)
    before = example.made(of, example.past())
    text = Saved(deployment=of, plan=before.plan).model_dump_json(indent=1)
    again = Saved.model_validate_json(text)
    assert again.plan == before.plan
    assert example.made(again.deployment, example.past()) == before


def test_each_ranktable_is_saved_once_however_many_hosts_have_it() -> None:
    of = example.service()
    plan = example.made(of, example.past()).plan
    saved = Saved(deployment=of, plan=plan)
    contents = [f.content for h in plan.hosts.values() for f in h.ranktables.files]
    assert len(contents) > len(set(contents))
    assert json.loads(saved.content)["ranktables"] == list(dict.fromkeys(contents))
    assert saved.content.count(b"server_group_list") == 1
    damaged = json.loads(saved.content) | {"ranktables": []}
    with pytest.raises(ValidationError, match="expected each ranktable's number"):
        Saved.model_validate(damaged)


def test_a_release_that_an_older_version_wrote_can_be_read() -> None:
    """It called the pinned image `exact`, and the chosen one `image`."""
    written = release(ONE).model_dump(mode="json")
    renamed = {"exact": written.pop("pinned_image"), "image": written.pop("chosen_image")}
    older = {**written, **renamed}
    assert Release.model_validate(older) == release(ONE)


def test_a_plan_that_an_older_version_saved_can_be_read() -> None:
    """It kept directories, files and commands of all instances in lists side by side."""
    text = (example.ROOT / "tests/data/saved-flat-plan.json").read_text()
    flat, plan = json.loads(text)["plan"], Saved.model_validate_json(text).plan
    assert plan.pinned_image == flat["image"]
    assert plan.hosts.keys() == flat["hosts"].keys()
    for name, host in plan.hosts.items():
        before = flat["hosts"][name]
        assert host.directories == before["directories"]
        files = [(file.path, file.mode, file.content) for file in host.files]
        assert files == [(file["path"], file["mode"], file["content"]) for file in before["files"]]
        assert host.instances.keys() == before["containers"].keys()
        commands = {command.pop("instance"): command for command in before["commands"]}
        for owner, instance in host.instances.items():
            container = instance.container.model_dump(mode="json")
            assert container.items() >= before["containers"][owner].items()
            assert instance.command.model_dump() == commands[owner]
            assert instance.start_script.path == f"{instance.directory}/start.sh"
            assert instance.directory.endswith(f"/{instance.generation}/{owner}")
            assert instance.log_directory.endswith(f"/{instance.generation}/{owner}")
        assert host.ranktables
        assert host.ranktables.directory.endswith(f"/{plan.servers}/ranktables")
        assert len(host.ranktables.files) == 2
    assert {plan.instance(name).generation for name in ("p0", "d0")} == {plan.servers}
    assert plan.instance("c0").generation == plan.generation != plan.servers


def test_a_flat_plan_that_lacks_something_is_refused() -> None:
    text = (example.ROOT / "tests/data/saved-flat-plan.json").read_text()
    flat = json.loads(text)["plan"]["hosts"]["a"]
    for key in ("directories", "files", "commands"):
        with pytest.raises(ValidationError):
            HostPlan.model_validate({**flat, key: flat[key][1:]})
