"""The engine vllm with vLLM itself: KV really moves from prefill to decode."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.teardown import teardown
from pd_deploy.lab import Lab, vllm
from tests.e2e.conftest import ROOT, Service
from tests.samples import ALL

PORT = 7001
FAULTY_ROUTER = Path(__file__).with_name("dropping_router.py")
PROMPT = "Decode writes the answer, one token after the other, and so on. How are you?"
MAX_TOKENS = 24
RECORD = "/var/lib/pd-deploy/lab-vllm-1p1d/record.json"
BENCHMARK = {"requests": 20, "concurrency": 2, "input_length": 64, "output_length": 16}
ANSWERED_ALONE = f"""
from vllm import LLM, SamplingParams
one = LLM({str(vllm.MODEL)!r}, max_model_len=512, dtype="bfloat16", block_size=32,
          enforce_eager=True, num_gpu_blocks_override=512)
sampling = SamplingParams(temperature=0, max_tokens={MAX_TOKENS})
(answer,) = one.generate([{PROMPT!r}], sampling)
print("ids", list(answer.outputs[0].token_ids))
"""
ALONE = {
    "PATH": f"{vllm.ENGINE}/bin:/usr/bin:/bin",
    "HOME": "/root",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


@pytest.fixture(scope="module")
def installed(lab: Lab) -> str:
    """vLLM on the tests' lab; the image it runs in."""
    vllm.prepare(print)
    return lab.push_packages(vllm.IMAGE, vllm.IMAGE_TAG, vllm.IMAGE_PACKAGES)


@pytest.fixture(scope="module")
def answered_alone(installed: str) -> list[int]:
    """What one server without any KV transfer answers, as token ids."""
    done = subprocess.run(
        [vllm.ENGINE / "bin/python", "-c", ANSWERED_ALONE],
        env=ALONE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ids: list[int] = json.loads(done.stdout.rpartition("ids ")[2])
    return ids


@pytest.fixture
def pair(lab: Lab, installed: str, ssh_block: str, tmp_path: Path) -> Iterator[Service]:
    """One prefill and one decode, each on a host of its own."""
    document = {
        "extends": str(ROOT / "deployments/lab-vllm-1p1d.yaml"),
        "image": installed,
        "hosts": {name: host.address for name, host in lab.hosts.items()},
        "ssh": {"credentials": ssh_block},
        "gates": {"ready": 300},
        "container": {"mounts": [f"{vllm.HOME}:ro", f"{FAULTY_ROUTER.parent}:ro"]},
    }
    path = tmp_path / "test-vllm.yaml"
    path.write_text(yaml.safe_dump(document))
    service = Service(path, lab)
    try:
        yield service
    finally:
        service.clean()


@pytest.mark.minutes
async def test_deploy_upgrade_a_router_that_drops_the_hand_over_and_teardown(
    pair: Service, answered_alone: list[int], worker: None, prefect: Callable[..., str]
) -> None:
    """In one test, because loading takes most of the time."""
    if ALL:  # half a minute: vLLM is imported once more
        pair.change(gates={"ready": 300, "benchmark": BENCHMARK})
    flow_run = run(prefect, pair)
    followed = prefect("pd-deploy", "follow", flow_run)
    if ALL:
        record = pair.lab.hosts["a"].run(["cat", RECORD]).stdout
        (figures,) = json.loads(record)["figures"]
        assert (figures["load"]["generator"], figures["answered"]) == ("vllm bench", 20)
        assert figures["version"] == metadata_of_vllm()
        pair.change(gates={"ready": 300})
    assert "KV transfer proven by the servers' counters: p0 (a) → d0 (b)" in followed
    assert not re.search("ranktable|device addresses", followed)
    assert await answer(pair) == answered_alone

    pair.change(settings={"decode": {"arguments": {"max-num-seqs": 2}}})
    state = await deploy(pair.file, return_state=True)
    assert "Generation 2-" in str(state.message)
    assert "proven" in str(state.message)
    assert await answer(pair) == answered_alone
    assert {c["Config"]["Labels"]["pd-deploy.epoch"] for c in running(pair)} == {"2"}

    # The proxy alone: its servers go on.
    before = pair.states()
    pair.change(vllm={"router": str(FAULTY_ROUTER)})
    state = await deploy(pair.file, return_state=True)
    assert state.is_failed()
    assert "expected decode to get the KV of the prompt's" in str(state.message)
    assert re.search(r"KV of 0 of \d+ prompt tokens went from p0 \(a\)", str(state.message))
    assert {c["Config"]["Labels"]["pd-deploy.epoch"] for c in running(pair)} == {"2"}
    assert {n: s for n, s in pair.states().items() if n != "c0"} == {
        n: s for n, s in before.items() if n != "c0"
    }
    assert await answer(pair) == answered_alone

    pair.change(
        vllm={}, settings={"decode": {"arguments": {"max-num-seqs": 2, "no-such-flag": True}}}
    )
    state = await deploy(pair.file, return_state=True)
    assert state.is_failed()
    assert "unrecognized arguments: --no-such-flag" in str(state.message)
    assert {c["Config"]["Labels"]["pd-deploy.epoch"] for c in running(pair)} == {"2"}
    assert await answer(pair) == answered_alone

    state = await teardown(pair.file, "lab-vllm-1p1d", return_state=True)
    assert state.is_completed(), state.message
    assert pair.containers() == {}


def metadata_of_vllm() -> str:
    """The version of vLLM that is installed for the lab."""
    (record,) = vllm.ENGINE.glob("lib/python3.11/site-packages/vllm-*.dist-info")
    return record.name.removeprefix("vllm-").removesuffix(".dist-info")


def run(prefect: Callable[..., str], service: Service) -> str:
    """Starts the deployment as a user does; the id of its run."""
    output = prefect(
        "prefect", "deployment", "run", "pd-deploy/lab-vllm-1p1d", "--param", f"file={service.file}"
    )
    flow_run = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", output)
    assert flow_run
    return flow_run[0]


async def answer(service: Service) -> list[int]:
    """What the service answers, as token ids."""
    request = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(timeout=60) as client:
        url = f"http://{service.lab.hosts['a'].address}:{PORT}/v1/completions"
        answered = await client.post(url, json=request)
    ids: list[int] = answered.json()["choices"][0]["token_ids"]
    return ids


def running(service: Service) -> list[dict[str, Any]]:
    return list(service.containers(running=True).values())
