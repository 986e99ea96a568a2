"""An image is asked what it is before anything stops, on hosts in memory."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pd_deploy.cli import image as asking
from pd_deploy.cli import planned as planning
from pd_deploy.config.load import load_deployment
from pd_deploy.engines.omniinfer.in_image import MARK
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from pd_deploy.steps.identifying import ANSWER_S
from tests.memory import answers
from tests.memory.world import ROOT, Outcome, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def serving(world: World) -> World:
    """A world in which the first image serves."""
    world.deploy()
    return world


def contract(world: World) -> str:
    """By which the generation that serves was rendered."""
    plan = world.machines["a"].disk.read(f"{ROOT}/{world.serving()}/plan.json")
    return plan.partition('"contract": "')[2].partition('"')[0]


def asked(outcome: Outcome) -> list[str]:
    """The hosts on which a run asked an image what it is."""
    return [
        m.host for m in outcome.moments if m.what.startswith("create pd-deploy-probe") and m.after
    ]


def no_container_is_left(world: World) -> bool:
    return not [c for m in world.machines.values() for c in m.containers.values() if is_probe(c)]


def is_probe(container: object) -> bool:
    return getattr(container, "name", "").startswith("pd-deploy-probe")


def night(world: World) -> Outcome:
    """A scheduled run for the newest image."""
    return world.run(deploy, image="newest", due=datetime.now(UTC))


@pytest.mark.parametrize("kind", ["v0-early", "v0"])
def test_what_the_image_says_decides_and_not_its_tag(world: World, kind: str) -> None:
    for tag in ("20250722_1", "20260301_1"):
        image = world.push(tag, answer=answers.of(kind))
        assert world.run(deploy, image=image).completed
        assert contract(world) == kind
    world.assert_coherent()


def test_an_image_is_asked_once_and_on_one_host(serving: World) -> None:
    image = serving.push("20250725_1")
    first = serving.run(deploy, image=image)
    assert asked(first) == ["a"]
    again = serving.run(deploy, image=image)
    assert again.completed
    assert asked(again) == []
    (facts,) = serving.record("b").images[serving.cluster.registry[image].digest].values()
    assert facts.script_directory == "/workspace/omniinfer/tools/scripts"
    assert no_container_is_left(serving)


def test_no_host_waits_with_its_pull_for_the_answer(serving: World) -> None:
    """A pull takes minutes: in turns, the night would take twice as long."""
    outcome = serving.run(deploy, image=serving.push("20260301_1"))
    pulls = [m.host for m in outcome.moments if m.what.startswith("pull") and not m.after]
    answer = next(i for i, m in enumerate(outcome.moments) if m.what.startswith("wait"))
    assert sorted(pulls) == ["a", "b"]
    assert {m.host for m in outcome.moments[:answer] if m.what.startswith("pull")} == {"a", "b"}


def test_a_service_of_before_images_were_asked_is_asked_once_and_not_restarted(
    serving: World,
) -> None:
    for host in "ab":
        path = f"{ROOT}/record.json"
        record = serving.record(host).model_copy(update={"images": {}})
        serving.machines[host].disk.put(path, record.model_dump_json(indent=1).encode(), 0o600)
    before = serving.runs()
    outcome = serving.run(deploy)
    assert "nothing to do" in outcome.message
    assert asked(outcome) == ["a"]
    assert asked(serving.run(deploy)) == []
    assert serving.runs() == before


def test_a_night_with_an_unknown_image_leaves_the_service_and_quarantines_nothing(
    serving: World,
) -> None:
    before, images = serving.runs(), {h: set(m.images) for h, m in serving.machines.items()}
    serving.push("20260801_1", answer=answers.of("unknown"))
    for ask in (["a"], []):  # the next night knows it already, and does not even pull it
        outcome = night(serving)
        assert "follows one of the contracts v0-early, v0, v1, roles; found" in str(outcome.error)
        assert "KV connectors NextConnector; vllm 0.30.0 → nothing was stopped" in str(
            outcome.error
        )
        assert asked(outcome) == ask
        assert serving.runs() == before
        assert {h: set(m.images) for h, m in serving.machines.items()} == images
    assert not serving.record().quarantine
    # And the night after that moves on.
    serving.push("20260802_1", answer=answers.of("v0"))
    assert night(serving).completed
    assert contract(serving) == "v0"
    serving.assert_coherent()


def test_the_contract_in_the_file_stands_for_an_unknown_image(serving: World) -> None:
    image = serving.push("20260801_1", answer=answers.of("unknown"))
    serving.change(contract="v0")
    assert serving.run(deploy, image=image).completed
    assert contract(serving) == "v0"


def test_a_contract_that_the_image_contradicts_is_refused_unless_the_file_allows_it(
    serving: World,
) -> None:
    image, before = serving.push("mine", answer=answers.of("v1")), serving.runs()
    serving.change(contract="v0")
    refused = str(serving.run(deploy, image=image).error)
    assert "contract: expected v1, as the image has scripts in" in refused
    assert "found v0 (rule contract-of-image)" in refused
    assert serving.runs() == before
    serving.change(allow=["contract-of-image"])
    assert serving.run(deploy, image=image).completed
    assert contract(serving) == "v0"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, f"to say what it is within {ANSWER_S:g} s, found no answer"),
        ("", "to say what it is, found no output (exit code 0)"),
        ("bash: python: not found", "found 'bash: python: not found' (exit code 0)"),
        (f"{MARK}{{", "found 'pd-deploy: the image is {' (exit code 0)"),
        (f"{MARK}[1]", "found 'pd-deploy: the image is [1]' (exit code 0)"),
        (f'{MARK}{{"programs": 1}}', "found 'pd-deploy: the image is {\"programs\": 1}'"),
    ],
    ids=["silence", "nothing", "no python", "half", "a list", "numbers"],
)
def test_no_answer_is_one_clear_error_and_the_file_can_answer_instead(
    serving: World, answer: str | None, said: str
) -> None:
    image, before = serving.push("20250725_1", answer=answer), serving.runs()
    outcome = serving.run(deploy, image=image)
    assert said in str(outcome.error)
    assert "host a (10.0.0.1): expected" in str(outcome.error)
    assert str(outcome.error).count("→") == 1
    assert serving.runs() == before
    assert no_container_is_left(serving)
    serving.change(contract="v0-early")
    assert serving.run(deploy, image=image).completed
    serving.assert_coherent()


def test_a_silent_image_is_not_asked_again_as_long_as_the_file_answers(serving: World) -> None:
    image = serving.push("20250725_1", answer="bash: python: not found")
    serving.change(contract="v0-early")
    first = serving.run(deploy, image=image)
    assert first.completed, first.error
    assert asked(first) == ["a"]
    assert asked(serving.run(deploy, image=image)) == []
    assert "the image did not say what it is" in planned(serving, image).said
    serving.change(contract="by-image")
    assert asked(serving.run(deploy, image=image)) == ["a"]


def test_hosts_without_room_are_not_filled_by_the_question(serving: World) -> None:
    image = serving.push("20250725_1")
    serving.change(disk={"image": "900000g"})
    outcome = serving.run(deploy, image=image)
    assert "free for the image" in str(outcome.error)
    assert not [m for m in outcome.moments if m.what.startswith("pull")]


def test_whenever_a_run_is_cancelled_no_container_is_left(serving: World) -> None:
    image = serving.push("20250725_1")
    moments = serving.twin().shared_run(deploy, image=image).moments
    of_probe = [m.number for m in moments if "pd-deploy-probe" in m.what]
    before = serving.runs()
    assert len(of_probe) > 8
    for number in of_probe:
        twin = serving.twin()
        outcome = twin.run(deploy, image=image, cancel_at=number)
        assert outcome.cancelled, outcome.error
        assert no_container_is_left(twin)
        assert twin.runs() == before


def test_a_dry_run_asks_no_image(serving: World) -> None:
    image, before = serving.push("20250725_1", answer=answers.of("unknown")), serving.state()
    outcome = serving.run(deploy, image=image, dry_run=True)
    assert "nothing was touched" in outcome.message
    assert serving.state() == before


def test_a_rollback_goes_by_the_contract_of_its_generation(serving: World) -> None:
    first = contract(serving)
    assert serving.run(deploy, image=serving.push("20250725_1", answer=answers.of("v0"))).completed
    assert contract(serving) == "v0" != first
    outcome = serving.run(rollback)
    assert outcome.completed
    assert asked(outcome) == []
    assert contract(serving) == first


def test_newer_images_may_follow_an_older_contract(world: World) -> None:
    """As several lines are built side by side; and a rollback goes to any that is kept."""
    kinds = ("roles", "v1", "v0")
    # v1's prefills bind ports of their own choice, and two of them share host a.
    world.change(keep=1, prefill={"p1": {"environment": {"VLLM_LLMDATADIST_BASE_PORT": 15600}}})
    world.deploy()
    generations = []
    for day, kind in enumerate(kinds, 1):
        world.push(f"2026080{day}_1", answer=answers.of(kind))
        outcome = night(world)
        assert outcome.completed, outcome.error
        assert contract(world) == kind
        generations.append(world.assert_coherent())
    assert world.run(rollback, generation=generations[-2]).completed
    assert contract(world) == kinds[-2]
    assert world.completes()


def test_the_command_shows_what_an_image_is_and_changes_nothing_else(serving: World) -> None:
    before, image = serving.runs(), serving.push("new", answer=answers.of("v1"))
    shown = serving.asked(asking.asked(load_deployment(serving.path, image=image), image, "b"))
    assert (shown.contract, list(shown.facts)) == ("v1", ["arm64"])
    assert "KV connectors" in asking.as_text(shown)
    assert json.loads(asking.as_json(shown))["contract"] == "v1"
    assert no_container_is_left(serving)
    assert serving.runs() == before
    assert shown.image.pinned_image in {
        d for i in serving.machines["b"].images.values() for d in i.digests
    }
    image = serving.push("newer", answer=answers.of("unknown"))
    shown = serving.asked(asking.asked(load_deployment(serving.path, image=image), image, None))
    assert "contract none that is known: expected an image that" in asking.as_text(shown)
    assert json.loads(asking.as_json(shown))["contract"] is None


def test_plan_report_and_releases_say_what_the_image_is(serving: World) -> None:
    pages: list[str] = []

    async def artifact(**given: object) -> None:
        pages.append(str(given.get("markdown", given.get("table"))))

    image = serving.push("20250725_1", answer=answers.of("v0"))
    unasked = planned(serving, image)
    assert "contract by-image; no run has asked the image yet what it is" in unasked.said
    assert unasked.known_of_image == {"contract": "by-image", "image_facts": {}}
    assert serving.run(deploy, image=image, artifacts=artifact).completed
    said = planned(serving, image).said.splitlines()[0]
    assert said.startswith("contract v0; the image has scripts in /workspace/omniinfer/tools/")
    known = planned(serving, image).known_of_image
    assert known["contract"] == "v0"
    assert "'connectors': ['AscendHcclConnectorV1']" in str(known["image_facts"])
    assert any(said[1:] in page for page in pages), "the report"
    assert any("'contract': 'v0'," in page for page in pages), "the table of releases"


def planned(world: World, image: str) -> planning.Planned:
    """What `pd-deploy plan` makes."""
    return world.asked(planning.look(load_deployment(world.path), image))
