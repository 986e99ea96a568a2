"""What became of each generation, which image a run takes, and what is kept."""

from datetime import UTC, datetime, timedelta

import pytest

from pd_deploy import deployment, engines, plan, releases, topology
from pd_deploy.history import Saved
from pd_deploy.plan import Made
from pd_deploy.releases import History, Outcome, Place, Quarantined, Record, Release
from tests.unit import example

START = datetime(2026, 1, 1, tzinfo=UTC)
HOST = Place(name="a", address="10.0.0.1")


def name(epoch: int) -> str:
    return f"{epoch}-{epoch:08x}"


def release(
    epoch: int, *, servers: int = 0, image: str = "omni:1", file: str = "omni:1"
) -> Release:
    return Release(
        generation=name(epoch),
        servers=name(servers or epoch),
        servers_fingerprint=f"{servers or epoch:08x}",
        image=image,
        exact=f"omni@sha256:{epoch:064x}",
        file_image=file,
        hosts={"a": HOST},
        logs=f"/logs/{name(epoch)}",
        created=START,
        started_by="a test",
    )


def history(*good: int, serving: int | None = None, others: tuple[Release, ...] = ()) -> History:
    """Good generations, promoted in this order, and others."""
    outcomes = {
        name(epoch): Outcome(result="good", when=START + timedelta(days=day), by="a test")
        for day, epoch in enumerate(good)
    }
    record = Record(serving=name(serving or good[-1]) if good else None, outcomes=outcomes)
    return releases.merge([record], [*map(release, good), *others], [])


class TestRecord:
    def test_promoted_twice_changes_nothing(self) -> None:
        once = Record().promoted(name(1), START, "a test")
        assert (once.serving, once.sequence) == (name(1), 1)
        assert once.promoted(name(1), START, "later") is once
        assert once.promoted(name(2), START, "later").sequence == 2

    def test_good_stays_good_when_a_later_attempt_fails(self) -> None:
        failed = Outcome(result="failed", when=START, by="a test", reason="x")
        good = Record().promoted(name(1), START, "a test")
        assert good.ended(name(1), failed) is good
        assert good.ended(name(2), failed).outcomes[name(2)].result == "failed"

    def test_images_go_into_quarantine_and_out(self) -> None:
        why = Quarantined(image="omni:2", when=START, reason="x")
        record = Record().quarantined("sha256:2", why)
        assert record.quarantine == {"sha256:2": why}
        assert record.released("sha256:1") is record
        assert record.released("sha256:2").quarantine == {}

    def test_hosts_are_noted_until_they_are_left(self) -> None:
        record = Record().on([HOST])
        assert record.on([HOST]) is record
        assert record.left(["10.0.0.2"]) is record
        assert record.left([HOST.address]).hosts == {}

    def test_the_highest_sequence_counts(self) -> None:
        old, new = Record(sequence=3, serving=name(1)), Record(sequence=4, serving=name(2))
        for records in ([old, new], [new, old]):
            assert releases.merge(records, [], []).record is new


class TestHistory:
    @pytest.mark.parametrize(
        ("past", "keep", "kept"),
        [
            (history(1, 2, 3, 4, 5), 2, {3, 4, 5}),
            (history(1, 2, 3, 4, 5), 1, {4, 5}),
            (history(1, 2, 3, serving=1), 1, {1, 3}),
            (history(1, others=(release(2), release(3))), 3, {1, 3}),
            (history(others=(release(1), release(2))), 3, {2}),
            # the third runs the servers of the first
            (history(1, 2, others=(release(3, servers=1),)), 1, {1, 2, 3}),
            (history(), 3, set()),
        ],
    )
    def test_pruning_keeps(self, past: History, keep: int, kept: set[int]) -> None:
        assert past.kept(keep) == {name(epoch) for epoch in kept}

    def test_a_rollback_goes_to_the_good_one_that_served_before(self) -> None:
        assert history(1, 2, 3).before() == name(2)
        assert history(1, 2, 3, serving=1).before() == name(3)
        assert history(1, others=(release(2),)).before() is None

    def test_rows_say_what_became_of_each(self) -> None:
        past = history(1, others=(release(2), release(3)))
        failed = Outcome(result="failed", when=START, by="a test", reason="ready p1: died\nmore")
        why = Quarantined(image="omni:2", when=START, reason="x")
        record = past.record.ended(name(2), failed).quarantined(release(2).digest, why)
        rows = releases.table(releases.merge([record], past.releases.values(), []))
        assert [row["result"] for row in rows] == [
            "unfinished",
            "failed, image quarantined",
            "serving",
        ]
        assert rows[1]["why"] == "ready p1: died"


class TestChoice:
    def test_the_run_the_promoted_one_or_the_file(self) -> None:
        promoted = release(1, image="omni:2", file="omni:1")
        for asked, serving, expected in (
            ("omni:9", promoted, ("omni:9", None)),
            (None, None, ("omni:1", None)),
            (None, promoted, ("omni:2", promoted.digest)),
            (None, release(1), ("omni:1", release(1).digest)),
            (None, release(1, image="omni:2", file="omni:0"), ("omni:1", None)),
        ):
            choice = releases.choose("omni:1", asked, serving)
            assert (choice.image, choice.digest) == expected


def make(changes: dict[str, object] | None, past: History) -> Made:
    of = example.service(changes)
    return plan.make(
        of,
        topology.build(of),
        engines.get(of.engine),
        facts=example.facts(of),
        image=example.IMAGE,
        history=past,
    )


def promoted(made: Made, *before: Release) -> History:
    """The history once a plan is promoted."""
    of = release(1).model_copy(
        update={
            "generation": made.plan.generation,
            "servers": made.plan.servers,
            "servers_fingerprint": made.servers_fingerprint,
        }
    )
    record = Record().promoted(made.plan.generation, START, "a test")
    return releases.merge([record], [*before, of], [])


PROXY = {"proxy": {"c0": {"core_num": 2}}}


def test_proxy_alone_moves_and_servers_stay_as_they_are() -> None:
    first = make(None, example.past())
    second = make(PROXY, promoted(first))
    assert second.plan.generation.startswith("2-")
    assert second.plan.servers == first.plan.generation
    for instance in ("p0", "p1", "p2", "d0"):
        assert second.plan.container(instance) == first.plan.container(instance)
    assert second.plan.container("c0").name.endswith(second.plan.generation)


def test_engine_moves_all() -> None:
    first = make(None, example.past())
    second = make({"settings": {"all": {"environment": {"X": 1}}}}, promoted(first))
    assert second.plan.servers == second.plan.generation
    assert {name.rpartition("_")[2] for name in second.plan.roles} == {second.plan.generation}


def test_known_generation_comes_back_with_the_servers_it_had() -> None:
    first = make(None, example.past())
    past = promoted(first)
    second = make(PROXY, past)
    later = promoted(second, *past.releases.values())
    assert make(PROXY, later).plan == second.plan


@pytest.mark.parametrize("file", sorted((example.ROOT / "deployments").glob("*.yaml")), ids=str)
def test_saved_generation_makes_the_same_plan_again(file) -> None:  # type: ignore[no-untyped-def]
    of, made = deployment.load(file), example.plan_of(file)
    again = Saved.model_validate_json(Saved(deployment=of, plan=made).model_dump_json())
    assert again.plan == made
    rendered = plan.make(
        again.deployment,
        topology.build(again.deployment),
        engines.get(of.engine),
        facts=example.facts(of),
        image=example.IMAGE,
        history=example.past(),
    )
    assert rendered.plan == made
