"""The main job, as a user does it: `prefect deployment run`, a plan, stages, a second run."""

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from bench.lab_service import INSTANCES
from pd_deploy.flows.deploy import deploy
from pd_deploy.planning.plans import STAGES, Plan
from tests.e2e.conftest import Service

EVENTS = ("create", "start", "stop")
CHANGING = {"create", "start", "stop", "die", "destroy"}


async def test_deployment_run_ends_with_a_verified_service(
    service: Service, worker: None, prefect: Callable[..., str], prefect_env: dict[str, str]
) -> None:
    """A worker runs it; the UI has the steps, the report and the table; no secret is anywhere."""
    output = prefect(
        "prefect", "deployment", "run", "pd-deploy/lab-qwq-3p1d", "--param", f"file={service.file}"
    )
    flow_run = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", output)
    assert flow_run
    followed = prefect("pd-deploy", "follow", flow_run[0])
    assert "✓ serve: start server p1" in followed
    assert "Completed: Generation 1-" in followed

    assert set(service.containers(running=True)) == INSTANCES
    async with httpx.AsyncClient() as client:
        answer = await client.post(
            f"http://{service.lab.hosts['a'].address}:7000/v1/completions",
            json={"model": "qwen", "max_tokens": 5, "prompt": "hello"},
        )
    assert answer.json()["choices"][0]["text"].strip()
    async with get_client() as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run[0]]))
        tasks = await client.read_task_runs(flow_run_filter=chosen)
        artifacts = await client.read_artifacts(flow_run_filter=chosen)
    names = {task.name for task in tasks}
    assert {
        "survey a",
        "prepare: launch d0",
        "prepare: ranktable b",
        "serve: prepare proxy c0",
        "serve: ready p2",
        "serve: promote",
    } <= names
    of_id = {task.id: task.name for task in tasks}
    before = {
        task.name: {of_id[edge.id] for edges in task.task_inputs.values() for edge in edges}
        for task in tasks
    }
    # At least these: Prefect keeps results by id(), and may take a new object for one that is gone.
    for task, others in {
        "identify image": {"resolve image"},
        "plan": {"identify image", "device addresses a", "device addresses b"},
        "prepare: preflight a": {"plan"},
        "prepare: compare hosts": {"prepare: preflight a", "prepare: preflight b"},
        "prepare: launch p1": {"prepare: save a"},
        "prepare: containers and files made": {"prepare: ranktable a", "prepare: ranktable b"},
        "cut-over: old generation stopped": {f"cut-over: clean up {i}" for i in INSTANCES - {"c0"}},
        "serve: free a": {"cut-over: old generation stopped"},
        "serve: start server p1": {"serve: devices and ports free", "serve: start server d0"},
        "serve: smoke test": {
            *(f"serve: ready {i}" for i in INSTANCES - {"c0"}),
            "serve: prepare proxy c0",
        },
        "tidy up: prune b": {"serve: promote"},
    }.items():
        assert others <= before[task]
    assert sum(map(len, before.values())) < 2 * len(tasks)
    assert {a.key for a in artifacts} == {
        f"qwq-3p1d-{what}" for what in ("report", "instances", "releases")
    }
    assert_no_secret(service, Path(prefect_env["PREFECT_HOME"]))
    assert_the_image_was_asked(service)


def assert_the_image_was_asked(service: Service) -> None:
    """What it said is what the stand-in is; of the container that said it nothing is left."""
    (of_image,) = service.record()["images"].values()
    (facts,) = of_image.values()
    assert facts["script_directory"] == "/workspace/omniinfer/tools/scripts"
    assert facts["connectors"] == ["AscendHcclConnectorV1"]
    assert (facts["packages"]["omni-infer"], facts["packages"]["CANN"]) == ("0.3.0", "8.2.RC1")
    assert {"--tp", "--master-ip"} <= set(facts["flags"]["start_api_servers.py"])
    assert "--listen-port" in facts["flags"]["global_proxy.sh"]
    assert facts["nginx"]
    for host in service.lab.hosts.values():
        left = host.run(["docker", "ps", "-aq", "--filter", "label=pd-deploy.role=probe"])
        assert left.stdout == ""


def assert_no_secret(service: Service, home: Path) -> None:
    """Neither the server's database nor a log or file of a host holds the private key."""
    secret = service.lab.ssh_key.read_text().splitlines()[2]
    assert len(secret) > 30
    with sqlite3.connect(home / "prefect.db") as database:
        dump = "\n".join(database.iterdump())
    assert "start server p1" in dump
    assert secret not in dump
    for host in service.lab.hosts.values():
        argv = ["grep", "-rlF", secret, "/var/lib/pd-deploy", "/data/log_path", "/var/log", "/tmp"]
        assert host.run(argv, check=False).stdout == ""


async def test_second_run_changes_nothing_and_says_so(
    service: Service, prefect: Callable[..., str]
) -> None:
    """Neither a container nor a file is touched, and the service goes on, as its status says."""
    await deploy(service.file)
    before, files = service.states(), service.files()
    events = [follow_events(host) for host in service.lab.hosts.values()]
    state = await deploy(service.file, return_state=True)
    assert "nothing to do, nothing changed" in str(state.message)
    assert service.states() == before
    assert service.files() == files
    assert [seen() for seen in events] == [[], []]
    status = json.loads(prefect("pd-deploy", "status", service.file, "--json"))
    assert (status["verdict"], status["drift"]) == ("serving", "")
    assert {instance["health"] for instance in status["instances"]} == {"healthy"}
    assert {host["devices"] for host in status["hosts"]} == {"healthy"}


async def test_what_plan_prints_is_what_happens(
    service: Service, prefect: Callable[..., str]
) -> None:
    """Containers as inspected, files as found, and the engines' own events match the plan."""
    plan = planned(service, prefect)
    assert service.containers() == {}
    assert service.files() == {}
    events = {name: follow_events(host) for name, host in service.lab.hosts.items()}
    await deploy(service.file)

    assert_only_planned_events(plan, events)
    for name, host in plan.hosts.items():
        for file in host.files:
            seen = service.lab.hosts[name].run(["cat", file.path]).stdout
            assert seen == file.content
            mode = service.lab.hosts[name].run(["stat", "-c", "0%a", file.path]).stdout.strip()
            assert mode == file.mode
    planned_files = {f"{n}:{file.path}" for n, host in plan.hosts.items() for file in host.files}
    assert service.files().keys() == planned_files

    containers = service.containers()
    for host in plan.hosts.values():
        for name, instance in host.instances.items():
            assert_matches(containers[name], instance.container.model_dump(mode="json"))


async def test_what_plan_prints_of_an_upgrade_is_what_happens(
    service: Service, prefect: Callable[..., str]
) -> None:
    """Also what stops; and once it is done, the plan is to do nothing."""
    await deploy(service.file)
    service.change(settings={"all": {"environment": {"EXAMPLE": "1"}}})
    plan = planned(service, prefect)
    events = {name: follow_events(host) for name, host in service.lab.hosts.items()}
    await deploy(service.file)
    assert_only_planned_events(plan, events)
    assert "stop" in {action.verb for action in plan.hosts["a"].actions}
    again = planned(service, prefect)
    assert [host.actions for host in again.hosts.values()] == [[], []]


def planned(service: Service, prefect: Callable[..., str]) -> Plan:
    """What `pd-deploy plan` prints for programs."""
    return Plan.model_validate_json(prefect("pd-deploy", "plan", service.file, "--format", "json"))


def assert_only_planned_events(plan: Plan, events: dict) -> None:  # type: ignore[type-arg]
    """The engines created, started and stopped the planned containers and no others, but for the
    one that says what its image is."""
    for name, host in plan.hosts.items():
        expected = {(a.verb, a.subject) for a in host.actions if a.verb in EVENTS}
        seen = [event for event in events[name]() if not event[1].startswith("pd-deploy-probe")]
        assert {event for event in seen if event[0] in EVENTS} == expected
        assert len(seen) == len(set(seen))


def assert_matches(inspected: dict, spec: dict) -> None:  # type: ignore[type-arg]
    """An inspected container has exactly the planned settings."""
    config, host = inspected["Config"], inspected["HostConfig"]
    assert inspected["Name"] == f"/{spec['name']}"
    assert config["Image"] == spec["image"]
    assert config["Entrypoint"] == spec["entrypoint"]
    assert config["Cmd"] == spec["command"]
    assert spec["environment"].items() <= dict(e.split("=", 1) for e in config["Env"]).items()
    assert spec["labels"].items() <= config["Labels"].items()
    assert config["StopSignal"] == "SIGINT"
    assert host["Privileged"] is spec["privileged"]
    assert host["ShmSize"] == spec["shm_size"]
    assert host["NetworkMode"] == "host"
    assert host["RestartPolicy"]["Name"] == "no"
    mounts = {(m["Source"], m["Target"], m.get("ReadOnly", False)) for m in host["Mounts"]}
    assert mounts == {(m["source"], m["target"], m["read_only"]) for m in spec["mounts"]}
    assert {d["PathOnHost"] for d in host["Devices"]} == set(spec["devices"])
    assert host["Binds"] is None


async def test_stages_one_by_one_end_as_one_full_run(service: Service) -> None:
    """cleanup, launch, ranktable, proxy, server: the same containers and files."""
    await deploy(service.file)
    full, full_files = described(service), service.files()
    service.clean()
    for stage in STAGES:
        assert not service.port_open()
        await deploy(service.file, stages=[stage])
    assert described(service) == full
    assert service.files() == full_files
    assert service.port_open()


def described(service: Service) -> dict[str, object]:
    """What of a container does not depend on when it was made."""
    return {
        name: (c["Name"], c["State"]["Status"], c["Config"]["Labels"], c["Config"]["Env"],
               c["Config"]["Cmd"], c["HostConfig"]["Mounts"], c["HostConfig"]["Devices"])
        for name, c in service.containers().items()
    }  # fmt: skip


async def test_a_stage_out_of_order_says_what_to_run_first(service: Service) -> None:
    """Nothing is guessed, and nothing is left behind."""
    state = await deploy(service.file, stages=["ranktable"], return_state=True)
    assert state.is_failed()
    assert "run the stage `launch` first" in str(state.message)
    assert service.files() == {}


async def test_dry_run_touches_nothing(service: Service) -> None:
    """It names every container and file per host."""
    state = await deploy(service.file, dry_run=True, return_state=True)
    assert str(state.message).startswith("Dry run: 22 changes")
    assert service.containers() == {}
    assert service.files() == {}


async def test_a_changed_file_is_a_new_generation_and_the_old_one_is_kept(
    service: Service,
) -> None:
    """P, D and proxy move together; the old containers are stopped, not removed."""
    await deploy(service.file)
    old = service.containers()
    service.change(settings={"all": {"environment": {"EXAMPLE": "1"}}})
    await deploy(service.file)
    new = service.containers(running=True)
    assert set(new) == INSTANCES
    assert {c["Config"]["Labels"]["pd-deploy.epoch"] for c in new.values()} == {"2"}
    for instance, container in old.items():
        argv = ["docker", "inspect", "-f", "{{.State.Status}}", container["Id"]]
        assert service.host_of(instance).run(argv).stdout.strip() == "exited"


def follow_events(host):  # type: ignore[no-untyped-def]
    """Starts to record a host's container events; call the result to get (verb, name) pairs."""
    since = host.run(["date", "+%s.%N"]).stdout.strip()

    def seen() -> list[tuple[str, str]]:
        now = host.run(["date", "+%s.%N"]).stdout.strip()
        argv = ["docker", "events", "--since", since, "--until", now, "--format", "{{json .}}"]
        events = [json.loads(line) for line in host.run(argv).stdout.splitlines()]
        return [
            (event["Action"], event["Actor"]["Attributes"]["name"])
            for event in events
            if event["Type"] == "container" and event["Action"] in CHANGING
        ]

    return seen
