"""The smoke test: a service is asked, as its clients will, and its KV is followed.

It is made before the public port opens, through a proxy that only it can reach; so nobody else's
requests count. On a service that is open already others may ask at the same time, and what can't
be told apart is said to be not provable.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import httpx

from pd_deploy.config.models import SmokeCheck
from pd_deploy.config.topology import Proxy
from pd_deploy.errors import SmokeTestFailed
from pd_deploy.hosts.concurrent import task_group, together
from pd_deploy.steps import containers
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.verify import requests, verdict
from pd_deploy.steps.verify.answers import Answer, NoAnswer, ask
from pd_deploy.steps.verify.handover import (
    TRIES,
    Exchange,
    Handover,
    ask_alone,
    hand_over,
    pairs,
)
from pd_deploy.steps.verify.requests import HANDOVER_TOKENS
from pd_deploy.steps.verify.servers import Counts, Servers, counted, not_counted, reached

DEATH_NOTICED_S = 2.0
CONTROLS = 3
"""How often each prefill is asked again where two prefills differ, to see whether it also differs
from itself."""
UNSAID = "the answer does not say how long the prompt is"

T = TypeVar("T")


@dataclass(frozen=True)
class Proof:
    """Whether KV was seen to move; `reason` says why that could not be seen."""

    verdict: Literal["proven", "not provable"]
    handovers: tuple[Handover, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.verdict == "not provable":
            return f"KV transfer not provable: {self.reason}"
        ways = dict.fromkeys(
            f"{handover.prefill} → {handover.decode}" for handover in self.handovers
        )
        return f"KV transfer proven by the servers' counters: {', '.join(ways)}"


@dataclass(frozen=True)
class Completion:
    """The completion that proved the service, and all else that was found.

    Attributes:
        url: where a client would ask for it, of each proxy that gave one; the first one's counts.
        seconds: how long the completion took.
        proof: whether its KV was seen to come from a prefill.
        remarks: what was seen and is no fault, and what could not be judged.
    """

    url: str
    prompt: str
    text: str
    seconds: float
    proof: Proof
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What a part of the smoke test found."""

    ways: tuple[Handover, ...] = ()
    remarks: tuple[str, ...] = ()
    unseen: str = ""
    """Why it could not be seen where KV came from; empty if it was."""


async def smoke_test(rollout: Rollout) -> Completion:
    """Asks every prefill and decode, and each proxy, and sees that nobody died of it.

    Raises:
        SmokeTestFailed: no answer, an error, an answer that can't be right, or KV that did not
            move.
        InstanceDied: a server or a proxy has ended since it was ready.
    """
    try:
        completion = await _prove(rollout)
    except SmokeTestFailed as error:
        # Whoever asks a server notices its death before its container has ended.
        if dead := await containers.any_dead(rollout, within=DEATH_NOTICED_S):
            raise dead from error
        raise
    if dead := await containers.any_dead(rollout):
        raise dead
    return completion


async def answers_clients(rollout: Rollout, name: str) -> None:
    """Asks a proxy for a completion where clients ask.

    Raises:
        SmokeTestFailed: none came.
    """
    session, proxy = rollout.session, rollout.session.topology.proxy(name)
    _, body = requests.completion(session.deployment, proxy)
    host, headers = session.host(proxy.host), session.authorization
    async with host.http(proxy.address, proxy.port, headers=headers) as client:
        entrance = Entrance(session, proxy, client, proxy.address, is_open=True)
        await entrance.completion({**body, "max_tokens": HANDOVER_TOKENS})


async def _prove(rollout: Rollout) -> Completion:
    session = rollout.session
    proxies = session.topology.proxies
    letting_in = together(containers.let_smoke_test_in(rollout, p.name) for p in proxies)
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(reached(session))
        async with task_group() as group:
            opened = group.create_task(letting_in)
            asked = group.create_task(handed_over(session, servers))
        direct, entrances = asked.result(), []
        for proxy, address in zip(proxies, opened.result(), strict=True):
            host, headers = session.host(proxy.host), session.authorization
            way = host.http(address, proxy.port, headers=headers)
            client, is_open = await stack.enter_async_context(way), address == proxy.address
            entrances.append(Entrance(session, proxy, client, address, is_open))
        # One after the other, as what servers count does not say through which proxy it came.
        through = [await entrance.handed_over(servers) for entrance in entrances]
        remarks = await _together(entrance.checked(servers) for entrance in entrances)
    evidence = [way for _, way in through]
    unseen = next(filter(None, (seen.unseen for seen in (*evidence, direct))), "")
    proof = Proof("proven", (*direct.ways, *(way for seen in evidence for way in seen.ways)))
    if unseen:
        proof = replace(proof, verdict="not provable", reason=unseen)
    answer, said = through[0][0], dict.fromkeys(remark for of in remarks for remark in of)
    urls = [requests.completion(session.deployment, proxy)[0] for proxy in proxies]
    return Completion(
        ", ".join(urls),
        session.deployment.smoke.prompt,
        answer.text,
        answer.seconds,
        proof,
        (*direct.remarks, *said),
    )


async def handed_over(session: Session, servers: Servers) -> Evidence:
    """Every prefill and every decode, asked directly; all at once, each for one thing at a time.

    Raises:
        SmokeTestFailed: a hand-over that does not work, or answers that other KV is behind.
    """
    deployment, engine = session.deployment, session.engine
    checks = [check for check in deployment.smoke.checks if check.prompt and check.expect]
    compared = [deployment.smoke.prompt, *(() if checks else requests.COMPARED)]
    several = len(servers.prefill) > 1
    work: list[Coroutine[Any, Any, Exchange]] = []
    for index, (prefill, decode) in enumerate(pairs(servers.prefill, servers.decode)):
        bodies = [requests.prompt(deployment, c.prompt or "", c.max_tokens) for c in checks]
        if index < len(servers.prefill):
            texts = [*compared, *compared[:1]] if several else compared
        else:
            texts = [] if checks else compared[:1]
        bodies += [requests.prompt(deployment, text, HANDOVER_TOKENS) for text in texts]
        work += [hand_over(engine, prefill, decode, body) for body in bodies]
    exchanges = await _together(work)
    remarks = [
        f"{exchange.prefill.name} had nothing to hand over for {exchange.prompt!r}: its first "
        "token ended the answer"
        for exchange in exchanges
        if not exchange.offered
    ]
    offered = [exchange for exchange in exchanges if exchange.offered]
    await _as_expected(session, checks, offered)
    if not checks:
        remarks += await _as_decode_alone(session, servers, offered)
    remarks += await _alike(
        session, [exchange for exchange in offered if exchange.prompt == compared[0]]
    )
    return Evidence(_ways(offered), tuple(dict.fromkeys(remarks)), _unseen(offered))


@dataclass(frozen=True)
class Entrance:
    """Where a proxy is asked: at its public address, or at one that only the smoke test knows."""

    session: Session
    proxy: Proxy
    client: httpx.AsyncClient
    address: str
    is_open: bool

    async def completion(self, body: Mapping[str, Any]) -> Answer:
        """Ask for a completion as a client does.

        Raises:
            SmokeTestFailed: none came.
        """
        try:
            answer = await self._ask(requests.COMPLETIONS, body)
        except NoAnswer as error:
            raise self._failed(requests.COMPLETIONS, "a completion", str(error)) from error
        if not answer.text.strip():
            raise self._failed(requests.COMPLETIONS, "a completion", f"the text {answer.text!r}")
        return answer

    async def handed_over(self, servers: Servers) -> tuple[Answer, Evidence]:
        """Ask for the completion that proves the service; return it, and where its KV came from.

        Raises:
            SmokeTestFailed: none came, or the proxy does not pass KV on.
        """
        _, body = requests.completion(self.session.deployment, self.proxy)
        for _ in range(TRIES):
            before = await servers.counts()
            answer = await self.completion(
                {**body, **self.session.engine.cache_busting_fields(str(uuid.uuid4()))}
            )
            since = await _counted_since(servers, before)
            way = way_through(servers, answer.prompt_tokens, since)
            if way is None or way.alone:
                break
        if unseen := not_counted(self.session.engine.COUNTERS, servers, since):
            return answer, Evidence(unseen=unseen)
        if way is None:
            return answer, Evidence(unseen=UNSAID)
        if not way.complete:
            raise self._failed(
                requests.COMPLETIONS,
                f"decode to get the KV of the prompt's {way.prompt_tokens} tokens from a prefill "
                "for a request",
                f"that it computed it itself: {way}",
                f"check whether the proxy passes {self.session.engine.HANDOVER_FIELDS} on, and "
                "read decode's log",
            )
        return answer, Evidence((way,), unseen=_unseen_way(way))

    async def checked(self, servers: Servers) -> list[str]:
        """All of `smoke.checks`, at once; what of them could not be judged. A prompt of tokens goes
        to a prefill and a decode themselves where the proxy takes none.

        Raises:
            SmokeTestFailed: all answers that are not as expected.
        """
        deployment = self.session.deployment
        engine = self.session.engine
        longest = engine.longest_prompt(deployment, self.session.topology)
        work: list[Coroutine[Any, Any, str]] = []
        remarks = []
        for check in deployment.smoke.checks:
            if check.prompt_tokens and self.is_open:
                remarks.append(f"{check.name}: not asked, because the service is in use")
                continue
            if check.prompt_tokens and not engine.TAKES_TOKEN_IDS:
                work.append(_check_directly(self.session, servers, check, longest))
            else:
                work.append(self._check(check, longest))
        return remarks + [remark for remark in await _together(work) if remark]

    async def _check(self, check: SmokeCheck, longest: int) -> str:
        question = requests.of_check(self.session.deployment, check, longest, str(uuid.uuid4()))
        try:
            answer = await self._ask(question.path, question.body)
        except NoAnswer as error:
            if error.status == 400 and "chat template" in str(error):
                return f"{question.name}: not judged, because the model has no chat template"
            raise self._failed(
                question.path, f"an answer to {question.name}", str(error)
            ) from error
        if check.expect is None:
            return ""
        if not verdict.fits(check.expect, answer.text):
            expected = f"an answer to {question.name} that matches {check.expect!r}"
            raise self._failed(
                question.path,
                expected,
                repr(answer.text),
                "if this is what the model is known to answer, correct `smoke.checks` in the file",
            )
        return ""

    async def _ask(self, path: str, body: Mapping[str, Any]) -> Answer:
        url = f"http://{self.address}:{self.proxy.port}{path}"
        return await ask(self.client, url, body, timeout=self.session.deployment.gates.smoke)

    def _failed(
        self, path: str, expected: str, found: str, hint: str | None = None
    ) -> SmokeTestFailed:
        proxy, logs = self.proxy, self.session.deployment.paths.logs
        return SmokeTestFailed(
            f"expected {expected} from http://{proxy.server}{path}, found {found}",
            host=self.session.host(proxy.host).where,
            instance=proxy.name,
            hint=hint or f"the instances' logs are in {logs} on their hosts",
        )


async def _check_directly(
    session: Session, servers: Servers, check: SmokeCheck, longest: int
) -> str:
    question = requests.of_check(session.deployment, check, longest, str(uuid.uuid4()))
    body = {key: value for key, value in question.body.items() if key != "stream"}
    await hand_over(session.engine, servers.prefill[0], servers.decode[0], body)
    return ""


def way_through(
    servers: Servers, prompt_tokens: int | None, since: Sequence[Counts]
) -> Handover | None:
    """Tell which way a request took through the proxy, by what all servers counted. Pure."""
    if prompt_tokens is None:
        return None
    count = len(servers.prefill)
    prefill = [s for s, c in zip(servers.prefill, since[:count], strict=True) if c.served]
    decode = [s for s, c in zip(servers.decode, since[count:], strict=True) if c.served]
    of_decode = since[count:]
    counting = since[:count] if servers.all[0].counters.kv_bytes_of == "prefill" else of_decode
    moved = [counts.kv_bytes for counts in counting if counts.kv_bytes is not None]
    tokens = sum(counts.kv_tokens or 0 for counts in of_decode)
    served = sum(counts.served or 0 for counts in of_decode)
    return Handover(
        prefill=", ".join(server.name for server in prefill),
        decode=", ".join(server.name for server in decode),
        prompt_tokens=prompt_tokens,
        kv_tokens=int(tokens),
        kv_bytes=int(sum(moved)) if moved else None,
        alone=served <= 1 and len(prefill) <= 1 and tokens <= prompt_tokens,
        proxied=True,
    )


async def _counted_since(servers: Servers, before: Sequence[Counts]) -> list[Counts]:
    async def since() -> list[Counts]:
        counts_now = await servers.counts()
        return [
            counts.since(counts_before)
            for counts, counts_before in zip(counts_now, before, strict=True)
        ]

    def enough(counted_now: Sequence[Counts]) -> bool:
        count = len(servers.prefill)
        of_prefill, of_decode = counted_now[:count], counted_now[count:]
        if all(counts.served is None for counts in of_prefill):
            return True
        has_sent = servers.prefill[0].counters.kv_bytes_of == "decode" or any(
            counts.served and counts.kv_bytes != 0 for counts in of_prefill
        )
        return (
            has_sent
            and any(counts.served for counts in of_prefill)
            and any(counts.is_complete() for counts in of_decode)
        )

    return await counted(since, enough, min(server.patience for server in servers.decode))


async def _as_expected(
    session: Session, checks: Sequence[SmokeCheck], exchanges: Sequence[Exchange]
) -> None:
    """Sees that each answer by a prefill's KV is the one that its check knows to be right."""
    wrong = [
        (check, exchange)
        for check in checks
        for exchange in exchanges
        if exchange.prompt == check.prompt
        and not verdict.fits(check.expect or "", exchange.answer.text)
    ]
    if not wrong:
        return
    check, first = wrong[0]
    body = requests.prompt(session.deployment, first.prompt, check.max_tokens)
    expected = f"expected an answer to {first.prompt!r} that matches {check.expect!r}"
    by = ", ".join(
        dict.fromkeys(f"{exchange.prefill.name} → {exchange.decode.name}" for _, exchange in wrong)
    )
    found = f"found {first.answer.text!r} with the KV handed over by {by}"
    try:
        alone = (await ask_alone(session.engine, first.decode, body)).text
    except NoAnswer as error:
        raise first.decode.failed(
            f"{expected}, {found}; what decode answers without it can't be told ({error})"
        ) from error
    if verdict.fits(check.expect or "", alone):
        raise first.decode.failed(
            f"{expected}, {found}, but {alone!r} without it: decode reads other KV than prefill "
            "made",
            "compare kv_parallel_size, tensor parallel sizes and ranktables with what the image "
            "takes",
        )
    raise first.decode.failed(
        f"{expected}, {found}, and {alone!r} without it: the model itself gives this answer",
        "look at the model's files; if this is what the model is known to answer, correct "
        "`smoke.checks`",
    )


async def _as_decode_alone(
    session: Session, servers: Servers, exchanges: Sequence[Exchange]
) -> list[str]:
    """Compare answers with decode's own, where no check knows the right answer."""
    decode = servers.decode[0]
    alone: dict[str, str] = {}
    for prompt in dict.fromkeys(exchange.prompt for exchange in exchanges):
        body = requests.prompt(session.deployment, prompt, HANDOVER_TOKENS)
        try:
            texts = {(await ask_alone(session.engine, decode, body)).text for _ in range(2)}
        except NoAnswer as error:
            return [
                "what the answers say was not judged: `smoke.checks` expects nothing, and "
                f"{decode.name} does not answer without a prefill ({error})"
            ]
        if len(texts) == 1:
            alone[prompt] = texts.pop()
    by_pair: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for exchange in exchanges:
        by_pair[exchange.prefill.name, exchange.decode.name][exchange.prompt] = exchange.answer.text
    for (prefill, to), texts_of in by_pair.items():
        if verdict.strays(texts_of, alone):
            prompt = next(iter(texts_of))
            raise decode.failed(
                f"expected the answers that decode gives without a prefill, found different "
                f"ones to all {len(texts_of)} prompts with the KV that {prefill} handed over to "
                f"{to}: to {prompt!r} {texts_of[prompt]!r} instead of {alone.get(prompt)!r}",
                "decode reads other KV than prefill made, or they have different model files",
            )
    return []


async def _alike(session: Session, exchanges: Sequence[Exchange]) -> list[str]:
    """Compare the prefills by their answers to one prompt."""
    answers = _texts(exchanges)
    prompt = exchanges[0].prompt if exchanges else ""
    difference = verdict.difference(prompt, answers)
    if difference and not difference.by_itself:
        body = requests.prompt(session.deployment, prompt, HANDOVER_TOKENS)
        firsts = {exchange.prefill.name: exchange for exchange in exchanges}
        repeated = await _together(
            hand_over(session.engine, exchange.prefill, exchange.decode, body)
            for exchange in firsts.values()
            for _ in range(CONTROLS)
        )
        difference = verdict.difference(prompt, _texts([*exchanges, *repeated]))
    if difference is None:
        return []
    if difference.by_itself:
        return [
            f"answers at temperature 0 differ even for the same prompt and prefill: {difference}; "
            "the engine is not deterministic, so prefills can't be compared"
        ]
    raise exchanges[0].decode.failed(
        f"expected the same answer whichever prefill made the KV, as each gives each time; "
        f"found {difference}",
        "check whether all instances have the same model files",
    )


def _texts(exchanges: Iterable[Exchange]) -> dict[str, list[str]]:
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for exchange in exchanges:
        texts[exchange.prefill.name].append(exchange.answer.text)
    return dict(texts)


def _ways(exchanges: Iterable[Exchange]) -> tuple[Handover, ...]:
    """One way per pair, the first."""
    ways: dict[tuple[str, str], Handover] = {}
    for exchange in exchanges:
        if exchange.way:
            ways.setdefault((exchange.way.prefill, exchange.way.decode), exchange.way)
    return tuple(ways.values())


def _unseen(exchanges: Sequence[Exchange]) -> str:
    if any(
        exchange.way is None and exchange.answer.prompt_tokens is None for exchange in exchanges
    ):
        return UNSAID
    return next(
        filter(None, (_unseen_way(exchange.way) for exchange in exchanges if exchange.way)), ""
    )


def _unseen_way(way: Handover) -> str:
    if way.alone:
        return ""
    return f"the service is under traffic; {way.decode} also counts other requests"


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; when some fail, all have ended before this raises.

    Raises:
        SmokeTestFailed: the one that failed, or all of them in one.
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    faults = [result for result in results if isinstance(result, SmokeTestFailed)]
    for result in results:
        if isinstance(result, BaseException) and result not in faults:
            raise result
    # One answer of a server is enough to know what is wrong with it.
    first_of: dict[str | None, SmokeTestFailed] = {}
    for fault in faults:
        first_of.setdefault(fault.instance, fault)
    if len(first_of) == 1:
        raise faults[0]
    if first_of:
        lines = ["several servers do not answer as they should:", *map(str, first_of.values())]
        raise SmokeTestFailed("\n- ".join(lines)) from faults[0]
    return [result for result in results if not isinstance(result, BaseException)]
