"""`pd-deploy tags`: what the registry has, and what a run for the newest would take."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from pd_deploy.cli import main, tags
from pd_deploy.config.models import Deployment, UpdatePolicy
from pd_deploy.records.releases import Quarantined
from pd_deploy.registry.client import Build, Search
from tests.unit import example

OLD, NEW = "registry.example/omni_infer-a3-arm", "registry.example/omniinfer-a3-arm"
DIGESTS = [f"sha256:{number:064x}" for number in range(2)]
SEARCH = Search(
    policy=UpdatePolicy.model_validate({"family": "release-timed", "engine": "vllm"}),
    tags={
        OLD: ("release_v0.6.0-20251111-vllm", "latest", "20250722_26"),
        NEW: (
            "release_v0.7.1-202602061150-vllm",
            "release_v0.7.1-202512052350-vllm",
            "release_v0.7.2-202602061150-vllm",
            "20260401_x",
        ),
    },
    builds=(
        "release_v0.7.2-202602061150-vllm",
        "release_v0.7.1-202602061150-vllm",
        "release_v0.7.1-202512052350-vllm",
        "release_v0.6.0-20251111-vllm",
    ),
    quarantined=(Build(NEW, "release_v0.7.1-202602061150-vllm", DIGESTS[1]),),
    newest=Build(NEW, "release_v0.7.1-202512052350-vllm", DIGESTS[0]),
)
QUARANTINE = {
    DIGESTS[1]: Quarantined(
        image=f"{NEW}:release_v0.7.1-202602061150-vllm",
        when=datetime(2026, 2, 7, tzinfo=UTC),
        reason="d0 exited",
    )
}
TEXT = f"""\
{OLD}: 3 tags, 1 of family release-timed (vllm)
  release_v0.6.0-20251111-vllm  not needed
  of other families: 20250722_26
  of no family: latest

{NEW}: 4 tags, 3 of family release-timed (vllm)
  release_v0.7.2-202602061150-vllm  listed, but not there
  release_v0.7.1-202602061150-vllm  in quarantine
  release_v0.7.1-202512052350-vllm  would be taken
  of no family: 20260401_x

would be taken: {NEW}:release_v0.7.1-202512052350-vllm (sha256:000000000000), as the newest build \
of family release-timed (vllm) that is not in quarantine
in quarantine: {NEW}:release_v0.7.1-202602061150-vllm (sha256:000000000000): d0 exited
seem newer, but `update` does not take them: 20260401_x
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command's output; what it reads from registry and hosts is given."""

    def read(_: Deployment) -> tuple[Search, dict[str, Quarantined]]:
        return SEARCH, QUARANTINE

    def call(*arguments: str) -> str:
        monkeypatch.setattr(tags, "read", read)
        main.app(["tags", str(example.FILE), *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


def test_each_repository_is_listed_with_what_becomes_of_its_builds(run: Any) -> None:
    assert run() == TEXT


def test_programs_get_all_of_it(run: Any) -> None:
    listed = json.loads(run("--json"))
    assert listed["taken"] == {
        "image": f"{NEW}:release_v0.7.1-202512052350-vllm",
        "digest": DIGESTS[0],
    }
    assert listed["quarantine"][DIGESTS[1]]["reason"] == "d0 exited"
    assert listed["newer_of_other_forms"] == ["20260401_x"]
    assert [one["repository"] for one in listed["repositories"]] == [OLD, NEW]
    assert listed["repositories"][0] == {
        "repository": OLD,
        "builds": ["release_v0.6.0-20251111-vllm"],
        "of_other_families": ["20250722_26"],
        "of_no_family": ["latest"],
    }


def test_many_builds_are_cut_short_for_people() -> None:
    builds = tuple(f"20250722_{number}" for number in range(30, 0, -1))
    search = Search(
        UpdatePolicy(family="daily"), {NEW: builds}, builds, (), Build(NEW, builds[0], DIGESTS[0])
    )
    text = tags.as_text(search, {})
    assert "20250722_21" in text
    assert "20250722_20" not in text
    assert "  and 20 older" in text


def test_without_a_build_to_take_it_says_so() -> None:
    search = Search(UpdatePolicy(family="daily"), {NEW: ("latest",)}, (), (), None)
    assert "would be taken: none, as the newest build of family daily" in tags.as_text(search, {})
