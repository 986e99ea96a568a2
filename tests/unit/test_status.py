"""What `pd-deploy status` tells, and by which exit code."""

import asyncio
import json
import re
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest

from pd_deploy.blocks import server
from pd_deploy.blocks.opening import open_session
from pd_deploy.cli import exit_codes, looks, next_runs, show
from pd_deploy.cli import hosts as asking
from pd_deploy.cli import status as showing
from pd_deploy.cli.next_runs import NextRuns
from pd_deploy.config.load import load_deployment
from pd_deploy.errors import HostUnreachable, InstanceDied, RolledBack
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from pd_deploy.flows.recover import recover
from pd_deploy.flows.rollback import rollback
from pd_deploy.records.releases import Release
from pd_deploy.records.status import Status, Verdict
from pd_deploy.steps.verify.looking import HEALTHY, InstanceLook
from tests.memory.calls import Moment
from tests.memory.programs import Proxy, Server
from tests.memory.world import ROOT, Faults, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "none.toml"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return World(tmp_path)


def told(world: World, last: looks.LastLook | None = None) -> showing.Told:
    """What a look tells."""

    async def tell() -> showing.Told:
        async with open_session(load_deployment(world.path)) as session:
            return await showing.tell(session, last)

    return world.asked(tell())


def of_fleet(world: World) -> Status:
    """What `fleet status` tells of the same."""
    (answer,) = world.asked(asking.statuses([load_deployment(world.path)]))
    assert isinstance(answer, Status)
    return answer


def ended(*instances: str) -> Callable[[World], None]:
    """Containers that end by themselves."""
    return lambda world: world.kill(*instances)


def gone(world: World) -> None:
    """A container that somebody removes."""
    (p2,) = [c for c in world.containers() if c.labels["pd-deploy.instance"] == "p2"]
    del world.machines["b"].containers[p2.id]


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        (lambda _: None, Verdict.SERVING),
        (ended("p1"), Verdict.DEGRADED),
        (gone, Verdict.DEGRADED),
        (lambda world: world.machines["b"].unplug(), Verdict.DOWN),
        (ended("p0", "p1", "p2"), Verdict.DOWN),
        (ended("d0"), Verdict.DOWN),
        (ended("c0"), Verdict.DOWN),
    ],
    ids=[
        "nothing",
        "a prefill",
        "a container removed",
        "decode's host",
        "all prefills",
        "d0",
        "c0",
    ],
)
def test_both_commands_judge_alike_and_say_it_by_their_exit_code(
    world: World, damage: Callable[[World], None], verdict: Verdict
) -> None:
    world.deploy()
    damage(world)
    one, other = told(world).look.status, of_fleet(world)
    assert (one.verdict, one.state) == (other.verdict, other.state)
    assert one.verdict == verdict
    code = {Verdict.SERVING: 0, Verdict.DEGRADED: 3, Verdict.DOWN: 4}[verdict]
    assert exit_codes.of([one.verdict]) == code


def test_what_never_was_deployed_is_down(world: World) -> None:
    look = told(world).look
    assert (look.status.verdict, look.status.state) == (Verdict.DOWN, "nothing is deployed")
    assert "nothing is deployed" in showing.text(told(world))


def test_a_release_of_an_older_version_is_judged_by_its_containers(world: World) -> None:
    world.deploy()
    for machine in world.machines.values():
        path = f"{ROOT}/{world.serving()}/release.json"
        document = json.loads(machine.disk.read(path))
        del document["instances"]
        assert Release.model_validate(document).instances == {}
        machine.disk.put(path, json.dumps(document).encode(), 0o600)
    assert told(world).look.status.serves
    ended("p1")(world)
    assert told(world).look.status.verdict == Verdict.DEGRADED
    ended("d0")(world)
    assert told(world).look.status.verdict == Verdict.DOWN


def test_a_server_that_runs_and_does_not_answer_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.deploy()
    answer = Server.answer

    def sick(server: Server, path: str, body: Any) -> httpx.Response:
        if path == "/health" and server.instance == "p1":
            return httpx.Response(500)
        return answer(server, path, body)

    monkeypatch.setattr(Server, "answer", sick)
    look = told(world).look
    assert look.status.verdict == Verdict.DEGRADED
    assert "p1 on a (10.0.0.1): status 500 on its health endpoint" in look.status.state
    monkeypatch.setattr(Proxy, "serving", lambda _: set())
    look = told(world).look
    assert look.status.verdict == Verdict.DOWN
    assert "c0 on a (10.0.0.1): does not answer (connection refused)" in look.status.state


def test_every_part_has_its_row(world: World) -> None:
    world.deploy()
    world.machines["a"].health[3] = "Alarm"
    text = showing.text(told(world))
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    release = told(world).look.release
    assert release
    assert text.startswith("qwq-3p1d: degraded: a (10.0.0.1): device 3: npu-smi says Alarm\n")
    assert json.loads(showing.as_document(told(world)))["verdict"] == "degraded"
    world.machines["a"].health.clear()
    assert showing.text(told(world)).startswith("qwq-3p1d: serving\n")
    assert release.generation in rows["generation"]
    assert release.digest[:19] in rows["image"]
    assert "run of pd-deploy" in rows["created"]
    assert rows["lease"].split() == ["lease", "free"]
    assert rows["drift"].split() == ["drift", "none"]
    assert "no Prefect server is configured" in rows["next"]
    assert rows["p0"].split()[:6] == ["p0", "prefill", "a", "0-7", "running", HEALTHY]
    assert rows["d0"].split()[1:3] == ["decode", "b"]
    assert rows["c0"].split()[1] == "proxy"
    assert rows["a"].split("  ")[-1].strip() == "device 3: npu-smi says Alarm"
    assert rows["b"].split()[-1] == HEALTHY


def test_an_unreachable_host_has_its_row_and_the_others_theirs(world: World) -> None:
    world.deploy()
    world.machines["b"].unplug()
    text = showing.text(told(world))
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert HEALTHY in rows["p0"]
    assert HEALTHY not in rows["d0"]
    assert "no answer: no SSH connection" in rows["b"]
    assert "not known: b could not be looked at" in rows["drift"]


def test_a_host_that_answers_otherwise_than_expected_is_not_called_silent(world: World) -> None:
    world.run(deploy)
    world.machines["b"].disk.put(f"{ROOT}/record.json", b"{", 0o600)
    text = showing.text(told(world))
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "no answer" not in text
    assert (
        f": host b (10.0.0.2): expected {ROOT}/record.json as pd-deploy wrote it"
        in rows["qwq-3p1d:"]
    )
    assert f"(10.0.0.2)  expected {ROOT}/record.json as pd-deploy wrote it" in rows["b"]


@pytest.mark.parametrize(
    ("damage", "result", "last"),
    [
        (lambda _: None, "serving", ""),
        (ended("p1"), "serving in part", "degraded: p1 on a (10.0.0.1): exited"),
        (lambda world: world.machines["b"].unplug(), "serving in part", "down: no answer from"),
    ],
)
def test_releases_are_listed_with_the_same_word_and_a_host_may_be_away(
    world: World, damage: Callable[[World], None], result: str, last: str
) -> None:
    world.deploy()
    damage(world)
    _, row, *rest = show.release_table(
        world.asked(asking.past(load_deployment(world.path)))
    ).splitlines()
    assert f"  {result}  " in row
    assert "".join(line for line in rest if not line.startswith("  ")).startswith(last)


def test_without_any_host_the_past_is_not_told_as_empty(world: World) -> None:
    for machine in world.machines.values():
        machine.unplug()
    with pytest.raises(HostUnreachable, match=r"host a .*\n  host b "):
        world.asked(asking.past(load_deployment(world.path)))


def test_of_a_service_of_which_no_host_answers_nothing_is_known(world: World) -> None:
    world.deploy()
    for machine in world.machines.values():
        machine.unplug()
    seen = told(world)
    text = showing.text(seen)
    assert text.startswith("qwq-3p1d: not known: no answer from host a (10.0.0.1)")
    assert not re.search("^(lease|drift|quarantine)", text, re.M)
    assert exit_codes.of([seen.look.status.verdict]) == exit_codes.FAILED
    assert json.loads(showing.as_document(seen))["verdict"] is None


def test_requests_and_kv_tokens_are_those_since_the_last_look(world: World) -> None:
    world.deploy()
    first = told(world)
    assert "first look" in showing.text(first)
    last = looks.of(first.look.instances, first.when)
    assert world.completes()
    second = told(world, last).since
    # The proxy in memory sends all to the first prefill, which counts its part and decode its own.
    assert (second["p0"].requests, second["p1"].requests, second["d0"].requests) == (1, 0, 1)
    assert second["d0"].kv_tokens
    assert second["p0"].kv_tokens is None


def test_a_server_that_started_since_is_counted_from_zero(world: World) -> None:
    world.deploy()
    last = looks.of(told(world).look.instances, datetime.now(UTC))
    ended("d0")(world)
    world.run(deploy)
    assert world.completes()
    after = told(world, last)
    d0 = next(i for i in after.look.instances if i.name == "d0")
    assert after.since["d0"].requests == d0.requests


def started_outside(world: World, instance: str) -> None:
    """What `docker restart` of somebody's does."""
    container = world.running()[instance]
    ended(instance)(world)
    world.pass_by(1)

    async def start() -> None:
        async with open_session(load_deployment(world.path)) as session:
            await session.host_of(instance).docker.start(container.id)

    world.asked(start())


def restarts(world: World) -> dict[str, tuple[int | None, bool]]:
    """How often what was touched was started again, and whether somebody else did it last."""
    instances = told(world).look.instances
    return {
        i.name: (i.restarts, i.started_outside)
        for i in instances
        if i.restarts != 0 or i.started_outside
    }


def test_each_restart_is_counted_whoever_makes_it(world: World) -> None:
    world.deploy()
    assert restarts(world) == {}
    every = ("p0", "p1", "p2", "d0", "c0")  # servers link, so all start again as one set
    for times, again in enumerate((health, health, deploy, recover), 1):
        ended("p1")(world)
        assert world.run(again).completed
        assert restarts(world) == dict.fromkeys(every, (times, False))
        world.pass_by(600)  # health waits ever longer before the next one
    ended("c0")(world)
    assert world.run(health).completed
    assert restarts(world) == dict.fromkeys(every, (4, False)) | {"c0": (5, False)}
    listed = json.loads(showing.as_document(told(world)))["instances"]
    assert [i["restarts"] for i in listed] == [4, 4, 4, 4, 5]


def test_restarts_are_those_since_the_generation_was_promoted(world: World) -> None:
    world.deploy()
    ended("p1")(world)
    assert world.run(health).completed
    assert world.run(deploy, image=world.push("20250725_1")).completed
    assert restarts(world) == {}
    assert world.run(rollback).completed  # its containers are started for the second time
    assert restarts(world) == {}
    bad = world.push("20250726_1", faults={"p1": Faults(dies=1)})
    assert isinstance(world.run(deploy, image=bad).error, RolledBack)
    assert restarts(world) == dict.fromkeys(("p0", "p1", "p2", "d0", "c0"), (1, False))


def test_servers_that_a_change_of_the_proxy_leaves_alone_go_on_to_be_counted(world: World) -> None:
    world.deploy()
    ended("p1")(world)
    assert world.run(health).completed
    world.change(proxy={"c0": {"arguments": {"client-body-buffer-size": "2048K"}}})
    before = world.runs()
    assert world.run(deploy).completed
    assert {name for name, run in world.runs().items() if run != before[name]} == {"c0"}
    assert restarts(world) == dict.fromkeys(("p0", "p1", "p2", "d0"), (1, False))


def test_a_restart_that_fails_its_gates_is_counted_too(world: World) -> None:
    world.deploy()
    world.cluster.faults["p1"] = Faults(dies=1)
    ended("p1")(world)
    assert isinstance(world.run(deploy).error, InstanceDied)
    counted = restarts(world)
    assert counted["p1"] == (1, False)
    world.cluster.faults.clear()
    assert world.run(recover).completed
    assert restarts(world)["p1"] == (2, False)


def test_a_restart_by_other_hands_is_told_and_counted_with_the_next(world: World) -> None:
    world.deploy()
    started_outside(world, "p1")
    assert restarts(world) == {"p1": (1, True)}
    assert re.search(r"^p1 .* 1, last outside", showing.text(told(world)), re.M)
    ended("p1")(world)
    assert world.run(health).completed
    assert restarts(world)["p1"] == (2, False)
    assert restarts(world)["p0"] == (1, False)


def test_what_an_older_version_has_not_counted_is_not_told_as_a_number(world: World) -> None:
    world.deploy()
    for machine in world.machines.values():
        record = json.loads(machine.disk.read(f"{ROOT}/record.json"))
        del record["starts"]
        machine.disk.put(f"{ROOT}/record.json", json.dumps(record).encode(), 0o600)
    assert restarts(world) == {}  # Docker says that none was
    ended("p1")(world)
    assert world.run(health).completed
    assert restarts(world)["p1"] == (None, False)
    assert re.search(r"^p1 .* not counted", showing.text(told(world)), re.M)
    assert world.run(deploy, image=world.push("20250725_1")).completed
    assert restarts(world) == {}


AT = datetime(2026, 1, 1, tzinfo=UTC)
RUNS = InstanceLook("d0", "decode", "b", container="running", run="1", requests=5, kv_tokens=50)


@pytest.mark.parametrize(
    ("before", "since"),
    [
        (replace(RUNS, requests=2, kv_tokens=20), (3, 30)),
        (replace(RUNS, run="0", requests=9, kv_tokens=90), (5, 50)),
        (replace(RUNS, run="", container="gone", requests=None, kv_tokens=None), (5, 50)),
        (replace(RUNS, health="does not answer", requests=None, kv_tokens=None), (None, None)),
        (replace(RUNS, run="", container="", requests=None, kv_tokens=None), (None, None)),
    ],
    ids=["the same run", "another run", "none", "one that hung", "a host that was away"],
)
def test_what_was_not_counted_at_the_last_look_is_not_told_as_served_since(
    before: InstanceLook, since: tuple[int | None, int | None]
) -> None:
    told = looks.since(looks.of([before], AT), RUNS)
    assert (told.requests, told.kv_tokens) == since


def test_the_last_look_is_kept_and_a_damaged_one_is_none(world: World) -> None:
    world.deploy()
    file = looks.path_of("qwq-3p1d", world.path)
    assert looks.read(file) is None
    last = looks.of(told(world).look.instances, datetime.now(UTC))
    looks.write(file, last)
    assert looks.read(file) == last
    file.write_text("{")
    assert looks.read(file) is None


@pytest.mark.parametrize(
    ("change", "drift"),
    [
        ({"image": "registry.example/omni:20250801_1"}, "the file has another image"),
        (
            {"settings": {"decode": {"environment": {"EXAMPLE": "1"}}}},
            "the file makes another generation",
        ),
    ],
)
def test_drift_against_the_file_is_told(world: World, change: dict[str, Any], drift: str) -> None:
    world.deploy()
    world.change(**change)
    look = told(world).look
    assert (look.drift or "").startswith(drift)
    assert look.status.serves


def test_a_file_that_was_changed_on_a_host_is_drift(world: World) -> None:
    world.deploy()
    disk = world.machines["b"].disk
    path = f"{ROOT}/{world.serving()}/d0/start.sh"
    disk.put(path, b"exit 1", 0o700)
    assert told(world).look.drift == f"a run would write {path} on b"


def test_other_ports_in_the_file_do_not_make_what_serves_unwell(world: World) -> None:
    world.deploy()
    world.change(proxy={"c0": {"port": 7100}}, ports={"api": 9300})
    look = told(world).look
    assert look.drift
    assert look.status.serves


def test_who_works_on_it_is_told(world: World) -> None:
    world.deploy()
    seen: list[str] = []

    def watch(moment: Moment) -> None:
        if moment.what.startswith("start ") and not seen:
            seen.append(world.machines["a"].disk.read(f"{ROOT}/lease"))

    world.run(deploy, image=world.push("20250723_1"), watch=watch)
    world.machines["a"].disk.put(f"{ROOT}/lease", seen[0].encode(), 0o600)
    row = next(r for r in showing.text(told(world)).splitlines() if r.startswith("lease"))
    assert "run of pd-deploy" in row
    assert "is working on qwq-3p1d" in row


def test_a_look_changes_nothing_and_costs_two_sessions_a_host(world: World) -> None:
    world.deploy()
    before, calls = world.state(), Counter[tuple[str, str]]()

    async def tell() -> None:
        async with open_session(load_deployment(world.path)) as session:
            for host in session.hosts.values():
                host.calls.watch = lambda m: calls.update([(m.host, m.way)])  # type: ignore[attr-defined]
            await showing.tell(session, None)

    world.asked(tell())
    assert world.state() == before
    # Each call passes two moments.
    assert {host: calls[host, "session"] // 2 for host in ("a", "b")} == {"a": 2, "b": 2}


def test_json_has_all_of_it(world: World) -> None:
    world.deploy()
    document = json.loads(showing.as_document(told(world)))
    assert document["verdict"] == "serving"
    assert document["generation"] == world.serving()
    assert [i["name"] for i in document["instances"]] == ["p0", "p1", "p2", "d0", "c0"]
    assert document["instances"][0]["since_last_look"] == {"requests": None, "kv_tokens": None}
    assert document["hosts"][0]["lease"] is None


class TestNextRuns:
    @pytest.fixture(autouse=True)
    def environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))

    def test_a_server_of_prefects_profile_counts(self, tmp_path: Path) -> None:
        (tmp_path / "profiles.toml").write_text(
            'active = "x"\n[profiles.x]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n'
        )
        assert asyncio.run(next_runs.told(["qwq-3p1d", "lab"])) == NextRuns(
            *["not known, as no Prefect server answered at http://127.0.0.1:9/api"] * 2
        )

    @pytest.mark.parametrize(
        ("status", "schedules", "paused", "runs", "said"),
        [
            (200, None, False, [], next_runs.NOT_THERE),
            (200, [], False, [], next_runs.OFF),
            (200, [False], False, [], next_runs.OFF),
            (200, [True], True, [], next_runs.OFF),
            (200, [False, True], False, [], next_runs.NOT_PLANNED),
            (200, [True], False, [{"expected_start_time": "2025-07-24T03:12:00+00:00"}],
             "2025-07-2"),
            (
                401,
                None,
                False,
                [],
                "not known, as http://prefect.example/api answers with status 401: check "
                "PREFECT_API_AUTH_STRING",
            ),
        ],
    )  # fmt: skip
    def test_the_server_is_asked_for_the_next_run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        status: int,
        schedules: list[bool] | None,
        paused: bool,
        runs: list[dict[str, str]],
        said: str,
    ) -> None:
        """Of the deployments whose schedule is on, each by its own."""
        asked: list[httpx.Request] = []

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            if request.url.path == "/api/flow_runs/filter":
                return httpx.Response(status, json=runs)
            if schedules is None:
                return httpx.Response(status, json=[])
            (flow,) = json.loads(request.content)["flows"]["name"]["any_"]
            on = [{"active": active} for active in schedules]
            found = {"id": f"of {flow}", "paused": paused, "schedules": on}
            return httpx.Response(status, json=[found])

        client = httpx.AsyncClient
        monkeypatch.setattr(
            server.httpx,
            "AsyncClient",
            lambda **kwargs: client(transport=httpx.MockTransport(answer), **kwargs),
        )
        monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:secret")
        due = asyncio.run(next_runs.told(["qwq-3p1d", "lab"]))
        assert due.nightly.startswith(said)
        assert due.check.startswith(said)
        questions = [(r.url.path, json.loads(r.content)) for r in asked]
        of_deployments = [q for path, q in questions if path == "/api/deployments/filter"]
        of_runs = [q for path, q in questions if path == "/api/flow_runs/filter"]
        assert len(of_deployments) + len(of_runs) == len(questions)
        assert {q["flows"]["name"]["any_"][0]: q["deployments"] for q in of_deployments} == {
            flow: {"tags": {"any_": ["qwq-3p1d", "lab"]}, "name": {"like_": ending}}
            for flow, ending in (("pd-deploy", "-nightly"), ("pd-health", "-health"))
        }
        is_on = said not in (next_runs.OFF, next_runs.NOT_THERE) and status == 200
        assert sorted(q["deployments"]["id"]["any_"] for q in of_runs) == (
            [["of pd-deploy"], ["of pd-health"]] if is_on else []
        )
        assert all(r.headers["Authorization"].startswith("Basic ") for r in asked)

    @pytest.mark.parametrize(
        ("settings", "sent"),
        [
            ({"PREFECT_API_AUTH_STRING": "me:secret"}, "Basic "),
            ({"PREFECT_API_KEY": "pnu_1"}, "Bearer pnu_1"),
            ({"PREFECT_API_SSL_CERT_FILE": "ca.pem"}, None),
            ({"PREFECT_API_TLS_INSECURE_SKIP_VERIFY": "true"}, None),
            ({"PREFECT_API_URL": "http://127.0.0.1/api"}, None),
            ({"PREFECT_API_URL": "http://10.1.2.3/api", "no_proxy": "10.1.2.3"}, None),
        ],
    )
    def test_it_is_asked_with_prefects_own_settings(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        settings: dict[str, str],
        sent: str | None,
    ) -> None:
        """A server as docs/production.md sets it up answers no others."""
        bundle = Path(certifi.where()).read_text()
        first = bundle[bundle.index("-----BEGIN") :].partition("-----END CERTIFICATE-----")
        (tmp_path / "ca.pem").write_text(first[0] + first[1])
        monkeypatch.chdir(tmp_path)
        made: dict[str, Any] = {}
        asked: list[httpx.Request] = []
        client = httpx.AsyncClient

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return httpx.Response(200, json=[])

        def recorded(**kwargs: Any) -> httpx.AsyncClient:
            made.update(kwargs)
            return client(transport=httpx.MockTransport(answer), **kwargs)

        monkeypatch.setattr(server.httpx, "AsyncClient", recorded)
        monkeypatch.setenv("PREFECT_API_URL", "https://127.0.0.1/api")
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert asyncio.run(next_runs.told(["qwq-3p1d", "lab"])) == NextRuns(
            next_runs.NOT_THERE, next_runs.NOT_THERE
        )
        assert asked[0].headers.get("Authorization", "").startswith(sent or "")
        assert made["trust_env"] is False
        if "PREFECT_API_SSL_CERT_FILE" in settings:
            assert len(made["verify"].get_ca_certs()) == 1
        if "PREFECT_API_URL" in settings:
            assert made["verify"].get_ca_certs() == []  # nothing is encrypted, so none is read
            assert made["verify"].verify_mode == ssl.CERT_REQUIRED
        assert (made["verify"] is False) is ("PREFECT_API_TLS_INSECURE_SKIP_VERIFY" in settings)
