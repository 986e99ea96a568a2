"""The smoke test tells a service whose KV moves from one whose decode does all the work."""

import re

from bench.client import Client
from pd_deploy.flows.deploy import deploy
from pd_deploy.lab.lifecycle import STANDIN
from tests.e2e.conftest import Service, long

METRICS = "usr/local/Ascend/latest/standin/metrics.py"


async def test_every_prefill_is_seen_to_hand_its_kv_over(service: Service) -> None:
    """Whichever host it is on."""
    state = await deploy(service.file, return_state=True)
    said = str(state.message)
    assert "KV transfer proven by the servers' counters: " in said
    for way in ("p0 (a) → d0 (b)", "p1 (a) → d0 (b)", "p2 (b) → d0 (b)"):
        assert way in said


async def test_a_decode_that_computes_the_prompt_itself_is_found_out(service: Service) -> None:
    """Its answers are right, and yet the run fails."""
    service.faults("d0", ignore_kv=True)
    state = await deploy(service.file, return_state=True)
    assert state.is_failed()
    assert "found that it computed it itself: KV of 0 of" in str(state.message)


async def test_a_prefill_that_hands_nothing_over_is_found_out_whichever_it_is(
    service: Service,
) -> None:
    """One request alone would seldom meet it."""
    service.faults("p1", refuse_kv=True)
    state = await deploy(service.file, return_state=True)
    assert state.is_failed()
    assert "told to refuse" in str(state.message)


@long
async def test_kv_parallel_size_follows_the_image_and_a_wrong_one_is_found_out(
    service: Service,
) -> None:
    """With a wrong one all links form, health and counters are fine, and answers are garbage."""
    await deploy(service.file)
    newer = service.push("20250901_1", {"/etc/example": "new"})
    state = await deploy(service.file, image=newer, return_state=True)
    assert state.is_completed(), state.message
    assert "KV transfer proven" in str(state.message)
    service.change(kv_parallel_size="prefill-pods-plus-one", allow=["kv-parallel-size"])
    state = await deploy(service.file, return_state=True)
    assert "decode reads other KV than prefill made" in str(state.message)
    assert "The service is back on generation 2-" in str(state.message)


async def test_traffic_neither_fails_a_healthy_service_nor_proves_it(service: Service) -> None:
    """A client asks all the time: on an open service, and as soon as the new one opens."""
    await deploy(service.file)
    with Client(service.url) as client:
        for _ in range(3):
            state = await deploy(service.file, return_state=True)
            assert state.is_completed(), state.message
            assert re.search("proven by|the service is under traffic", str(state.message))
        service.change(settings={"all": {"environment": {"EXAMPLE": "1"}}})
        state = await deploy(service.file, return_state=True)
        assert "KV transfer proven by the servers' counters" in str(state.message)
        assert client.served_again()
    down = re.search(
        r"down for ([\d.]+) s, (?:.*, )?([\d.]+) s of it for the smoke test", str(state.message)
    )
    assert down
    assert float(down[2]) < float(down[1])


async def test_an_image_without_such_counters_is_not_called_proven(service: Service) -> None:
    """As those of the time of the stand-in's."""
    code = (STANDIN / "image" / METRICS).read_text()
    silent = code.replace(
        'return "\\n".join(lines)',
        'return "\\n".join(line for line in lines if "by_source" not in line)',
    )
    assert silent != code
    service.change(image=service.push("20250722_90", {METRICS: silent}))
    state = await deploy(service.file, return_state=True)
    assert state.is_completed()
    assert "KV transfer not provable: d0 counts no vllm:prompt_tokens_by_source_total" in str(
        state.message
    )
