"""How often a run goes to each of its hosts and back; what it costs grows with that."""

from collections import Counter

import pytest

from pd_deploy.flows.deploy import deploy
from tests.memory.world import Outcome, World

# By host, in this order. A session starts a process and a login shell on the host, a call of the
# Docker engine or of SFTP is an answer on a connection that is there. What requests to the service
# cost, the smoke test says.
WAYS = ("session", "docker", "sftp")


def trips(outcome: Outcome, host: str) -> dict[str, int]:
    """How often a run went to a host, by the way it took."""
    assert outcome.completed, outcome.error
    counts = Counter(m.way for m in outcome.moments if m.host == host and not m.after)
    return {way: counts[way] for way in WAYS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    world = World(tmp_path_factory.mktemp("trips"))
    return {
        "cold": world.run(deploy),
        "nothing to do": world.run(deploy),
        "upgrade": world.run(deploy, image=world.push("20250725_1")),
    }


# Host a has the proxy and two prefills, and is where the image is asked what it is; host b has a
# prefill and a decode. Of an upgrade's calls of the
# Docker engine and of SFTP some are looks of waits, so there is room for a few more.
@pytest.mark.parametrize(
    ("kind", "host", "most"),
    [
        ("nothing to do", "a", (6, 11, 0)),
        ("nothing to do", "b", (6, 7, 0)),
        ("upgrade", "a", (21, 98, 74)),
        ("upgrade", "b", (17, 55, 55)),
        ("cold", "a", (23, 80, 75)),
        ("cold", "b", (19, 45, 60)),
    ],
)
def test_a_run_goes_to_a_host_no_more_often(
    runs: dict[str, Outcome], kind: str, host: str, most: tuple[int, ...]
) -> None:
    counts = trips(runs[kind], host)
    assert counts == {w: min(counts[w], m) for w, m in zip(WAYS, most, strict=True)}


def test_a_survey_is_one_session_and_a_call_per_container(runs: dict[str, Outcome]) -> None:
    outcome = runs["nothing to do"]
    on_b = [m for m in outcome.moments if m.host == "b" and not m.after]
    # Before it, the run connects, takes its lease, and looks for copies that are missing.
    sessions = [n for n, m in enumerate(on_b) if m.way == "session"]
    survey = on_b[sessions[3 - 1] + 1 : sessions[4]]
    assert Counter(m.way for m in survey) == {"session": 1, "docker": 2 + 2}
