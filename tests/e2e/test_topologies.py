"""Other topologies than 3P1D come up on the lab: decode over both hosts with a proxy on each, and
all on one host."""

import json
from typing import Any

import httpx
import pytest
from prefect.blocks.system import Secret

from bench.lab_service import INSTANCES
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.health import health
from tests.e2e.conftest import Service, long
from tests.e2e.patient_clients import PatientClients

OVER_TWO_HOSTS: dict[str, Any] = {
    "profile": "deepseek-r1-a3-2p1d",
    "prefill": {
        "p0": {"devices": "8-15"},
        "p1": {"host": "b", "devices": "8-15"},
        "p2": None,
    },
    "decode": {"d0": {"host": None, "hosts": ["b", "a"], "devices": "0-1"}},
}
KEY = "sk-test-0123456789"
ON_ONE_HOST: dict[str, Any] = {
    "prefill": {"p0": {"devices": "0-3"}, "p1": {"devices": "4-7"}, "p2": None},
    "decode": {"d0": {"host": "a", "devices": "8-11"}},
}


async def test_decode_over_both_hosts_serves_from_each_of_its_servers(service: Service) -> None:
    """Every API server is healthy, in each proxy's list, of its own rank, and gets KV."""
    service.change(**OVER_TWO_HOSTS, proxy={"c1": {"host": "b"}})
    await deploy(service.file)
    running = service.containers(running=True)
    assert set(running) == {"p0", "p1", "d0-0", "d0-1", "c0", "c1"}
    ports = {name: c["Config"]["Labels"]["pd-deploy.ports"] for name, c in running.items()}
    assert (ports["d0-0"], ports["d0-1"]) == ("9100,9101,8100,5668", "9101,9102,5669")

    address = {name: host.address for name, host in service.lab.hosts.items()}
    servers = [
        (address["b"], 9100),
        (address["b"], 9101),
        (address["a"], 9101),
        (address["a"], 9102),
    ]
    async with httpx.AsyncClient() as client:
        for host, port in servers:
            assert (await client.get(f"http://{host}:{port}/health")).status_code == 200
        for proxy in ("a", "b") * 8:
            body = {"model": "qwen", "max_tokens": 5, "prompt": "hello"}
            answer = await client.post(f"http://{address[proxy]}:7000/v1/completions", json=body)
            assert answer.json()["choices"][0]["text"].strip()
        metrics = [(await client.get(f"http://{h}:{p}/metrics")).text for h, p in servers]
    for text in metrics:
        assert 'requests_by_source_total{source="local_compute"} 0' in text
        assert 'requests_by_source_total{source="external_kv_transfer"} 0' not in text
    assert ranks(service, "b", "d0-0") == ["dp rank 0 of 4", "dp rank 1 of 4"]
    assert ranks(service, "a", "d0-1") == ["dp rank 2 of 4", "dp rank 3 of 4"]

    before = service.states()
    state = await deploy(service.file, return_state=True)
    assert "nothing to do, nothing changed" in str(state.message)
    assert service.states() == before


async def test_a_member_that_dies_brings_the_whole_set_back(service: Service) -> None:
    """A run after it starts every instance anew, those of the other host too."""
    service.change(**OVER_TWO_HOSTS)
    await deploy(service.file)
    before = started(service)
    container = service.containers()["d0-1"]
    service.lab.hosts["a"].run(["docker", "kill", container["Id"]])
    await deploy(service.file)
    after = started(service)
    assert set(after) == {"p0", "p1", "d0-0", "d0-1", "c0"}
    assert [name for name in after if after[name] == before[name]] == []


async def test_two_prefills_and_decode_share_one_host(service: Service) -> None:
    """Four devices each; the other host is not needed and not asked. Clients need a key."""
    host, secrets = service.lab.hosts["a"], "/etc/test.env"
    host.run(["sh", "-c", f"umask 077 && cat >{secrets}"], input=f"VLLM_API_KEY='{KEY}'\n")
    await Secret(value=KEY).save("test-key", overwrite=True)  # type: ignore[misc]
    service.change(
        **ON_ONE_HOST,
        hosts={"a": host.address, "b": None},
        api_key={"credentials": "test-key"},
        container={"environment_file": secrets, "stop_timeout": 10},
    )
    await deploy(service.file)
    assert set(service.containers(running=True)) == {"p0", "p1", "d0", "c0"}
    assert service.lab.hosts["b"].run(["docker", "ps", "-aq"]).stdout == ""
    body = {"model": "qwen", "max_tokens": 5, "prompt": "hello"}
    async with httpx.AsyncClient(timeout=60) as client:
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {KEY}"}, 200)):
            url = f"{service.url}/v1/completions"
            answer = await client.post(url, json=body, headers=headers)
            assert answer.status_code == status
    everywhere = "ps -eo args; find /var/lib/pd-deploy -type f -exec cat {} +"
    shown = host.run(["sh", "-c", everywhere]).stdout + json.dumps(service.containers())
    assert secrets in shown
    assert KEY not in shown


async def test_upstreams_own_values_bring_a_service_up(service: Service) -> None:
    """Faults and all: the engine warns of what it does not read, and serves."""
    service.change(compat="upstream")
    await deploy(service.file)
    assert set(service.containers(running=True)) == INSTANCES
    script = "cat /data/log_path/*/*/d0/server_0.log"
    log = service.lab.hosts["b"].run(["sh", "-c", script]).stdout
    assert "HCCL_OP_EXPANSION_MOD is read by nothing" in log


@pytest.mark.parametrize("instance", [pytest.param("d0-0", marks=long), "d0-1"])
async def test_every_server_of_an_instance_must_be_healthy(service: Service, instance: str) -> None:
    """The run waits, and fails saying which instance does not answer."""
    service.change(**OVER_TWO_HOSTS, gates={"ready": 8})
    service.faults(instance, unhealthy=True)
    state = await deploy(service.file, return_state=True)
    assert state.is_failed()
    assert f"instance {instance}" in str(state.message)
    assert not service.port_open()


@long
async def test_clients_of_two_proxies_lose_nothing_and_one_is_mended_alone(
    service: Service,
) -> None:
    """Requests are held at both while all servers are replaced; then one proxy is killed."""
    service.change(proxy={"c0": {"hold": 50}, "c1": {"host": "b", "hold": 50}})
    await deploy(service.file)
    service.change(settings={"all": {"environment": {"EXAMPLE": "1"}}})
    urls = [f"http://{host.address}:7000" for host in service.lab.hosts.values()]
    with PatientClients(urls[0]) as first, PatientClients(urls[1]) as second:
        state = await deploy(service.file, return_state=True)
    assert [held for held in ("c0 held", "c1 held") if held not in str(state.message)] == []
    for clients in (first, second):
        assert [kept.lost for kept in clients.kept.values()] == [[], [], []]
        assert sum(kept.refused for kept in clients.kept.values()) == 0
    before = started(service)
    service.lab.hosts["b"].run(["docker", "kill", service.containers()["c1"]["Id"]])
    mended = await health(service.file, return_state=True)
    assert mended.name == "Mended"
    assert [name for name, when in started(service).items() if when != before[name]] == ["c1"]


def ranks(service: Service, host: str, instance: str) -> list[str]:
    """What each server of an instance says of its place in the world, by server."""
    script = f"cat /data/log_path/*/*/{instance}/server_*.log"
    lines = service.lab.hosts[host].run(["sh", "-c", script]).stdout.splitlines()
    said = [line for line in lines if "dp rank" in line]
    return [line[line.index("dp rank") :].partition(",")[0] for line in said]


def started(service: Service) -> dict[str, str]:
    """When each running container was started."""
    return {
        n: json.dumps(c["State"]["StartedAt"]) for n, c in service.containers(running=True).items()
    }
