"""The smoke test against real stand-in engines: what it finds, and what it lets pass."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from pd_deploy import engines
from pd_deploy.errors import SmokeTestFailed
from pd_deploy.lab.standin.processes import Instance, StandinSet, hand_over, standin_set
from pd_deploy.planning import placement
from pd_deploy.steps.verify.servers import Servers, not_counted, reached
from pd_deploy.steps.verify.smoke import Evidence, handed_over, way_through
from tests.unit import example

COUNTED = "vllm:prompt_tokens_by_source_total"
TWO_PREFILLS = {"prefill": {"p2": None}}


@dataclass
class Host:
    """A host whose servers are processes on loopback addresses."""

    instance: Instance
    where: str = "a (10.0.0.1)"

    @asynccontextmanager
    async def http(
        self, address: str, port: int, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.AsyncClient]:
        transport = Elsewhere(self.instance)
        async with httpx.AsyncClient(
            transport=transport, trust_env=False, headers=headers
        ) as client:
            yield client


class Elsewhere(httpx.AsyncHTTPTransport):
    """Sends all requests to one instance."""

    def __init__(self, instance: Instance) -> None:
        super().__init__()
        self.instance = instance

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        instance = self.instance
        request.url = request.url.copy_with(host=instance.host, port=instance.api_port)
        return await super().handle_async_request(request)


class Session:
    """What the smoke test uses of a session."""

    authorization: Mapping[str, str] = MappingProxyType({})

    def __init__(self, instances: StandinSet, smoke: dict[str, Any]) -> None:
        changes = TWO_PREFILLS if instances.prefills == 2 else {}
        self.deployment = example.service({**changes, "smoke": smoke})
        self.topology = placement.build(self.deployment)
        self.engine = engines.get("omniinfer")
        self._instances = instances

    def host_of(self, name: str) -> Host:
        return Host(self._instances[name])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinSet]:
    with standin_set(tmp_path_factory.mktemp("set"), prefills=2) as instances:
        instances.start()
        instances.wait_ready()
        yield instances


@pytest.fixture
def instances(running: StandinSet) -> Iterator[StandinSet]:
    """The same servers for all tests, without faults of another test."""
    yield running
    for instance in running.instances.values():
        instance.set_faults()


async def proven(instances: StandinSet, **smoke: Any) -> tuple[Evidence, str]:
    """What asking all of them directly finds, and what is not counted."""
    session: Any = Session(instances, smoke)
    async with reached(session) as servers:
        found = await handed_over(session, servers)
        return found, not_counted(session.engine.COUNTERS, servers, await servers.counts())


async def test_each_prefill_is_proven_whatever_a_balancer_would_choose(
    instances: StandinSet,
) -> None:
    found, uncounted = await proven(instances)
    assert {(way.prefill, way.decode) for way in found.ways} == {
        ("p0 (a)", "d0 (b)"),
        ("p1 (a)", "d0 (b)"),
    }
    assert all(way.complete and way.alone for way in found.ways)
    assert (found.remarks, found.unseen, uncounted) == ((), "", "")


async def test_nothing_stays_held_at_the_prefills(instances: StandinSet) -> None:
    # KV that decode refused in another test stays held, as at the original.
    prefills = [instances[name] for name in ("p0", "p1")]
    before = [prefill.metric("standin:kv_blocks_held") for prefill in prefills]
    await proven(instances)
    for prefill, held in zip(prefills, before, strict=True):
        prefill.wait_for_metric("standin:kv_blocks_held", held)


@pytest.mark.parametrize(
    ("instance", "fault", "message"),
    [
        ("d0", {"ignore_kv": True}, "found that it computed it itself: KV of 0 of"),
        ("p1", {"refuse_kv": True}, "told to refuse"),
        ("p0", {"error_status": 503}, "status 503"),
        ("d0", {"garbage": True}, "expected an answer by the KV that"),
    ],
)
async def test_faults_are_named_with_their_instance(
    instances: StandinSet, instance: str, fault: dict[str, Any], message: str
) -> None:
    instances[instance].set_faults(**fault)
    with pytest.raises(SmokeTestFailed) as raised:
        await proven(instances)
    assert message in str(raised.value)
    assert instance in str(raised.value)


async def test_silent_garbage_is_found_by_a_check_that_knows_the_answer(
    instances: StandinSet,
) -> None:
    """Health, links and counters are all right; decode reads other KV."""
    instances["d0"].set_faults(other_heads=True)
    with pytest.raises(SmokeTestFailed, match="decode reads other KV than prefill made"):
        await proven(instances)


async def test_silent_garbage_is_found_without_any_check(instances: StandinSet) -> None:
    """By what decode answers without a prefill."""
    instances["d0"].set_faults(other_heads=True)
    with pytest.raises(SmokeTestFailed, match="found different ones to all 3 prompts"):
        await proven(instances, checks=[])


async def test_a_healthy_service_passes_without_any_check(instances: StandinSet) -> None:
    found, _ = await proven(instances, checks=[])
    assert found.remarks == ()
    assert len(found.ways) == 2


async def test_a_wrong_expectation_is_told_from_wrong_kv(instances: StandinSet) -> None:
    checks = [{"prompt": "how are you?", "expect": "^ fine"}]
    with pytest.raises(SmokeTestFailed, match="the model itself gives this answer"):
        await proven(instances, checks=checks)


async def test_others_requests_make_it_not_provable(instances: StandinSet) -> None:
    """They may not make up for KV that got lost, and they are no fault."""
    over = asyncio.Event()
    body = {"model": "qwen", "prompt": "somebody else asks this", "max_tokens": 30}

    async def traffic() -> None:
        while not over.is_set():
            await asyncio.to_thread(hand_over, instances["p0"], instances["d0"], body)

    clients = [asyncio.ensure_future(traffic()) for _ in range(4)]
    try:
        found, _ = await proven(instances)
    finally:
        over.set()
        await asyncio.gather(*clients)
    assert "the service is under traffic" in found.unseen
    assert len(found.ways) == 2


async def test_the_way_through_the_proxy_is_seen_by_all_counters(instances: StandinSet) -> None:
    """Which prefill and decode the proxy chose, and whether others asked too."""
    session: Any = Session(instances, {})
    async with reached(session) as servers:
        way = await through(servers, instances["p1"], instances["d0"])
        assert (way.prefill, way.decode, way.alone) == ("p1 (a)", "d0 (b)", True)
        assert "from p1 (a) to d0 (b) through the proxy" in str(way)
        both = await through(servers, instances["p1"], instances["d0"], others=instances["p0"])
        assert not both.alone


async def through(
    servers: Servers, prefill: Instance, decode: Instance, others: Instance | None = None
) -> Any:
    body = {"model": "qwen", "prompt": "how are you?", "max_tokens": 5}
    before = await servers.counts()
    for one in filter(None, (prefill, others)):
        await asyncio.to_thread(hand_over, one, decode, body)
    now = await servers.counts()
    return way_through(servers, 4, [n.since(b) for n, b in zip(now, before, strict=True)])
