"""The engine sglang with SGLang's own router and a strict stand-in for its server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from pd_deploy.flows.deploy import deploy
from pd_deploy.lab import Lab, sglang
from tests.e2e.conftest import ROOT, Service

PORT = 7002
PROMPT = "2, 4, 6, 8,"


@pytest.fixture
def service(lab: Lab, ssh_block: str, tmp_path: Path) -> Iterator[Service]:
    """The lab's example, but for its second prefill, which is over both hosts."""
    document = {
        "extends": str(ROOT / "deployments/lab-sglang-2p1d.yaml"),
        "image": sglang.push(lab, print),
        "hosts": {name: host.address for name, host in lab.hosts.items()},
        "ssh": {"credentials": ssh_block},
        "gates": {"ready": 60},
        "prefill": {"p1": {"host": None, "hosts": ["b", "a"], "devices": {"b": "0", "a": "2"}}},
    }
    path = tmp_path / "test-sglang.yaml"
    path.write_text(yaml.safe_dump(document))
    service = Service(path, lab)
    try:
        yield service
    finally:
        service.clean()


async def test_each_prefill_hands_its_kv_over_and_one_whose_kv_does_not_fit_is_found_out(
    service: Service,
) -> None:
    """Also one over two hosts; and the service is back after a decode that takes no KV."""
    state = await deploy(service.file, return_state=True)
    assert state.is_completed(), state.message
    said = str(state.message)
    assert "KV transfer proven by the servers' counters: " in said
    assert "p0 (a) → d0 (b)" in said
    assert "p1-0 (b) → d0 (b)" in said
    assert set(service.containers(running=True)) == {"p0", "p1-0", "p1-1", "d0", "c0"}
    before = service.states()

    service.change(
        settings={"decode": {"arguments": {"page-size": 64}}},
        allow=["kv-layout"],
    )
    state = await deploy(service.file, return_state=True)
    assert state.is_failed()
    assert "Both servers must use the same --page-size value" in str(state.message)
    assert "back on generation 1-" in str(state.message)
    assert {n: s[0] for n, s in service.states().items()} == {n: s[0] for n, s in before.items()}
    url = f"http://{service.lab.hosts['a'].address}:{PORT}/v1/completions"
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(url, json={"model": "qwq", "prompt": PROMPT, "max_tokens": 6})
    assert answer.json()["choices"][0]["text"] == " 10, 12, 14"
