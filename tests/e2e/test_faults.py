"""What goes wrong, done for real: each fault ends in one clear error, and nothing is half done."""

import asyncio
import re
from collections.abc import Callable
from datetime import datetime

import pytest
from prefect.client.schemas.objects import State

from pd_deploy.blocks.ssh import SshCredentials
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from tests.e2e.conftest import Service, long, until

LOAD_S = 40
TRACEBACK = "Traceback (most recent call last)"


async def run(service: Service, **parameters: object) -> State[None]:
    """A run in this process, on the tests' Prefect server; its final state."""
    return await deploy(service.file, return_state=True, **parameters)  # type: ignore[call-overload]


def seconds_after_death(service: Service, instance: str, state: State[None]) -> float:
    """From the end of an instance's container to the end of the run.

    At once is before the others have loaded; a busy machine has seconds of its own.
    """
    finished = service.containers()[instance]["State"]["FinishedAt"]
    return (state.timestamp - datetime.fromisoformat(finished)).total_seconds()


async def test_server_that_dies_while_loading_fails_the_run_at_once(service: Service) -> None:
    """With the last lines of its log; the rest is stopped, and the proxy never opened."""
    service.faults("p1", load_seconds=LOAD_S, crash_after=1.5, exit_code=3)
    service.faults("p2", load_seconds=LOAD_S)
    state = await run(service)
    message = str(state.message)
    assert state.is_failed()
    assert "instance p1: ended with exit code 0" in message
    assert TRACEBACK in message
    assert seconds_after_death(service, "p1", state) < LOAD_S / 2
    assert service.containers(running=True) == {}
    assert not service.port_open()


async def test_server_killed_from_outside_fails_the_run_at_once(service: Service) -> None:
    """Also without a word in its log."""
    service.faults("d0", load_seconds=LOAD_S)
    running = asyncio.ensure_future(run(service))
    await asyncio.to_thread(until, lambda: {"d0", "p0"} <= service.containers(running=True).keys())
    await asyncio.to_thread(service.kill, "d0")
    state = await running
    assert "instance d0: ended with exit code 137" in str(state.message)
    assert seconds_after_death(service, "d0", state) < LOAD_S / 2


async def test_the_proxy_opens_only_when_the_smoke_test_has_passed(service: Service) -> None:
    """While one prefill still loads, and while the service is proven, nobody can connect."""
    service.faults("p2", load_seconds=4)
    service.faults("d0", token_seconds=0.02)
    running = asyncio.ensure_future(run(service))
    await asyncio.to_thread(until, lambda: "c0" in service.containers(running=True))
    log = ["docker", "logs", service.containers()["c0"]["Id"]]
    proxy = service.host_of("c0")
    for said in ("proxy prepared", "proxy open to the smoke test"):
        await asyncio.to_thread(until, lambda said=said: said in proxy.run(log).stdout)
        for _ in range(10):
            assert not service.port_open()
            await asyncio.sleep(0.05)
    assert (await running).is_completed()
    assert service.port_open()


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"hang": True}, "expected an answer on its health endpoint within 6 s"),
        pytest.param({"garbage": True}, "expected an answer by the KV that", marks=long),
        pytest.param({"error_status": 503}, "status 503", marks=long),
    ],
)
async def test_server_that_lives_but_does_not_serve(
    service: Service, faults: dict[str, object], expected: str
) -> None:
    """Hanging, garbage and errors are failures, each by its name."""
    if "hang" in faults:
        service.change(gates={"ready": 6})
    service.faults("d0", **faults)
    state = await run(service)
    assert state.is_failed()
    assert expected in str(state.message)
    assert service.containers(running=True) == {}


@long
async def test_a_member_that_died_restarts_the_whole_set(service: Service) -> None:
    """A lone restart cannot link again; `stages=[server]` is enough to mend it."""
    await deploy(service.file)
    before = service.states()
    service.kill("p1")
    state = await run(service, stages=["server"])
    assert state.is_completed(), state.message
    after = service.states()
    assert set(service.containers(running=True)) == set(before)
    for name, (identity, was) in before.items():
        assert after[name][0] == identity
        assert after[name][1]["StartedAt"] > was["StartedAt"]  # type: ignore[index]


@long
async def test_run_after_a_failed_one_completes(service: Service) -> None:
    """The same generation is started again, with its own containers."""
    service.faults("p0", crash_after=0.2)
    assert (await run(service)).is_failed()
    failed = service.containers()
    service.faults("p0")
    assert (await run(service)).is_completed()
    assert {n: c["Id"] for n, c in failed.items()} == {
        n: c["Id"] for n, c in service.containers(running=True).items()
    }


@long
async def test_absent_image_leaves_the_old_service_alone(service: Service) -> None:
    """It is found out before anything stops, and not retried."""
    await deploy(service.file)
    before = service.states()
    repository = "omni-ci/daily_omniinfer"
    state = await run(service, image=f"registry.example/{repository}:20990101_1")
    assert state.is_failed()
    assert f"{repository}:20990101_1" in str(state.message)
    assert service.states() == before


async def test_taken_port_and_missing_paths_are_named_together(
    service: Service, prefect: Callable[..., str]
) -> None:
    """All faults of a host at once, with who holds the port; nothing was created. A preflight tells
    them as well, and what else is wrong."""
    service.change(model={"path": "/data/models/absent"})
    script = "import socket, time; s = socket.create_server(('', 9001)); time.sleep(600)"
    holder = service.lab.hosts["a"].popen(["python3", "-c", script])
    try:
        ports = ["ss", "-Hltn"]
        until(lambda: ":9001" in service.lab.hosts["a"].run(ports).stdout)
        state = await run(service)
        tls = ["sh", "-c", "echo tls_enable_3=1 >>/etc/hccn.conf"]
        service.lab.hosts["b"].run(tls)
        service.set_clock("b", ahead=95)
        table = prefect("pd-deploy", "preflight", service.file, status=1)
    finally:
        holder.kill()
        holder.wait()
        service.lab.hosts["b"].run(["sed", "-i", "/^tls_enable_3=1$/d", "/etc/hccn.conf"])
        service.set_clock("b", ahead=0)
    checks = {tuple(line.split()[:3]) for line in table.splitlines()}
    assert {("error", "device-tls", "b"), ("error", "host", "a"), ("error", "host", "b")} <= checks
    assert ("warning", "clock", "b") in checks
    assert re.search(r"found it 9[3-7] s ahead of", " ".join(table.split()))
    assert re.search(r"^a \(.* clock [+-][01]\.\d s from here", table, re.MULTILINE)
    assert "port 9001" in table
    message = str(state.message)
    assert "port 9001" in message
    assert "python3" in message
    assert message.count("/data/models/absent") == 2
    assert service.containers() == {}
    assert service.files() == {}


async def test_host_unplugged_during_launch_is_retried_until_it_is_back(service: Service) -> None:
    """A cut link is a transient fault: the same run goes on when the link is mended."""
    running = asyncio.ensure_future(run(service))
    await asyncio.to_thread(until, service.containers)
    service.lab.hosts["b"].cut()
    await asyncio.sleep(1)
    service.lab.hosts["b"].mend()
    assert (await running).is_completed()


async def test_host_that_stays_away_is_named(service: Service, prefect: Callable[..., str]) -> None:
    """After the retries the error says which host, and the other one is untouched; a plan says the
    same, and what is on the other one."""
    service.change(gates={"connect": 0.5})
    service.lab.hosts["b"].cut()
    state = await run(service)
    assert state.is_failed()
    where = f"host b ({service.lab.hosts['b'].address})"
    assert where in str(state.message)
    assert service.containers() == {}
    plan = prefect("pd-deploy", "plan", service.file, status=7)
    assert "== host a\nnothing of the deployment runs there\n" in plan
    assert f"\nno answer from {where}: " in plan


@long
async def test_a_server_that_hangs_is_restarted_by_health(service: Service) -> None:
    """Its process is stopped, so the kernel takes connections for it and nobody answers them. The
    whole set starts again, as servers link while they load."""
    service.change(health={"hung_after": 2}, container={"stop_timeout": 2})
    assert (await run(service)).is_completed()
    before = service.states()
    server = ["pkill", "-STOP", "-f", "vllm serve.* --port 9001 "]
    service.lab.hosts["a"].run(server)
    first = await health(service.file, return_state=True)
    assert first.name in ("Degraded", "Down")
    assert "p1 gave no answer at 1 check (restarted at 2)" in str(first.message)
    assert service.states() == before
    second = await health(service.file, return_state=True)
    assert second.name == "Mended", second.message
    assert service.completes()
    after = service.states()
    assert not [name for name in before if before[name] == after[name]]


async def test_wrong_password_fails_at_once_and_is_never_shown(
    service: Service, prefect: Callable[..., str]
) -> None:
    """One error per host, no retry, and the password in no message."""
    known = service.lab.known_hosts.read_text()
    block = SshCredentials(password="not-the-password", known_hosts=known)  # type: ignore[arg-type]
    await block.save("test-wrong", overwrite=True)  # type: ignore[misc]
    service.change(ssh={"user": "deployer", "credentials": "test-wrong"})
    output = prefect("pd-deploy", "deploy", service.file, status=1)
    assert "does not let user deployer in" in output
    assert "will retry" not in output
    assert "not-the-password" not in output
    assert "Traceback" not in output


async def test_missing_block_says_how_to_make_it(
    service: Service, prefect: Callable[..., str]
) -> None:
    """Invalid input: exit code 2."""
    service.change(ssh={"credentials": "no-such-block"})
    output = prefect("pd-deploy", "deploy", service.file, status=2)
    assert "pd-deploy credentials ssh no-such-block" in output


async def test_unknown_host_key_is_refused(service: Service) -> None:
    """And the message has what is needed to add it."""
    block = SshCredentials(private_key=service.lab.ssh_key.read_text(), known_hosts="")  # type: ignore[arg-type]
    await block.save("test-unknown", overwrite=True)  # type: ignore[misc]
    service.change(ssh={"credentials": "test-unknown"})
    state = await run(service)
    assert "its host key is not known" in str(state.message)
    assert "ssh-ed25519" in str(state.message)


async def test_image_without_nginx_is_prepared_from_the_given_sources(service: Service) -> None:
    """The proxy builds nginx before anything else of it starts."""
    host = service.lab.hosts["a"]
    host.run(["mkdir", "-p", "/data/src/nginx-1.24.0"])
    host.run(["touch", "/data/src/nginx-1.24.0/configure"])
    host.run(["tar", "czf", "/data/src/nginx.tar.gz", "-C", "/data/src", "nginx-1.24.0"])
    digest = host.run(["sha256sum", "/data/src/nginx.tar.gz"]).stdout.split()[0]
    sources = {"nginx_tarball": "/data/src/nginx.tar.gz", "nginx_sha256": digest}
    service.change(proxy={"c0": sources})
    service.change(image=f"{service.lab.image}-nonginx")
    state = await run(service)
    assert state.is_completed(), state.message


async def test_cancelled_run_stops_what_it_started(service: Service) -> None:
    """Nothing is left running, nothing is lost, and the run says so."""
    service.faults("d0", load_seconds=LOAD_S)
    running = asyncio.ensure_future(run(service))
    await asyncio.to_thread(until, lambda: len(service.containers(running=True)) == 5)
    running.cancel()
    state = await running
    assert state.is_cancelled()
    assert "Interrupted" in str(state.message)
    assert service.containers(running=True) == {}
    assert len(service.containers()) == 5


async def test_one_connection_per_host_serves_a_whole_run(service: Service) -> None:
    """Counted by sshd itself."""
    count = ["grep", "-c", "Accepted publickey", "/var/log/sshd.log"]
    before = [int(h.run(count, check=False).stdout) for h in service.lab.hosts.values()]
    await deploy(service.file)
    after = [int(host.run(count).stdout) for host in service.lab.hosts.values()]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]


@long
async def test_server_that_dies_of_the_first_request(service: Service) -> None:
    """The error is its death with its log, and not just that no answer came."""
    service.faults("d0", crash_on_request=True)
    state = await run(service)
    assert "instance d0: ended with exit code" in str(state.message)
    assert service.containers(running=True) == {}


@long
async def test_host_lost_while_loading_is_the_error_and_the_rest_is_stopped(
    service: Service,
) -> None:
    """What could not be stopped, because its host is gone, does not hide that."""
    service.change(gates={"connect": 0.5, "ready": 8})
    service.faults("d0", load_seconds=60)
    running = asyncio.ensure_future(run(service))
    await asyncio.to_thread(until, lambda: len(service.containers(running=True)) == 5)
    service.lab.hosts["b"].cut()
    state = await running
    lost = f"host b ({service.lab.hosts['b'].address}): no SSH connection"
    assert str(state.message).startswith(lost)
    host = service.lab.hosts["a"]
    assert host.run(["docker", "ps", "-q"]).stdout == ""
