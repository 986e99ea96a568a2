"""The API servers of a service, each reached directly, and what they count."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import httpx

from pd_deploy.config.topology import Instance
from pd_deploy.engines.base import Counters
from pd_deploy.errors import SmokeTestFailed
from pd_deploy.hosts.concurrent import together
from pd_deploy.steps.patience import patiently
from pd_deploy.steps.session import Session
from pd_deploy.steps.verify import metrics
from pd_deploy.steps.verify.answers import Answer, NoAnswer, ask, no_answer
from pd_deploy.steps.verify.requests import COMPLETIONS

T = TypeVar("T")

COUNTED_WITHIN_S = 3.0
"""How long a server may take to count a request that it has answered."""
IMPATIENT_S = 0.5
"""The same for a server that has once not counted in time: it will not."""
POLL_INTERVAL_S = 0.05
METRICS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Counts:
    """A server's counters; None for what it does not count."""

    served: float | None
    kv_tokens: float | None
    kv_bytes: float | None

    def is_complete(self) -> bool:
        """Whether a request is counted, with all that the server counts of it."""
        if self.served is None:
            return True
        return self.served > 0 and self.kv_tokens != 0 and self.kv_bytes != 0

    def since(self, before: "Counts") -> "Counts":
        """Subtract `before`, which may lack counters: some servers show one only once it counts."""
        return Counts(
            _grown(self.served, before.served),
            _grown(self.kv_tokens, before.kv_tokens),
            _grown(self.kv_bytes, before.kv_bytes),
        )


@dataclass
class Server:
    """One API server of an instance.

    `turn` is held by whoever asks it: an engine that works on one request at a time gives the same
    answer each time, and counts nothing else.
    """

    instance: Instance
    port: int
    client: httpx.AsyncClient
    counters: Counters
    timeout: float
    where: str
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    patience: float = COUNTED_WITHIN_S

    @property
    def name(self) -> str:
        """`d0 (b)`: its instance and host, with its port where the instance has several servers."""
        several = len(self.instance.api_ports) > 1
        port = f", port {self.port}" if several else ""
        return f"{self.instance.name} ({self.instance.host}{port})"

    @property
    def url(self) -> str:
        """Where its host reaches it."""
        return f"http://{self.instance.address}:{self.port}"

    async def ask(self, body: Mapping[str, object], request_id: str) -> Answer:
        """Its answer to a completion.

        Raises:
            NoAnswer: see `answers.ask`.
        """
        headers = {"X-Request-Id": request_id}
        url = f"{self.url}{COMPLETIONS}"
        return await ask(self.client, url, body, timeout=self.timeout, headers=headers)

    async def counts(self) -> Counts:
        """Its counters now.

        Raises:
            SmokeTestFailed: it does not answer.
        """
        try:
            url = f"{self.url}/metrics"
            answer = await patiently(partial(self.client.get, url, timeout=METRICS_TIMEOUT_S))
        except httpx.HTTPError as error:
            found = no_answer(error, METRICS_TIMEOUT_S)
            raise self.failed(
                f"expected counters from {self.url}/metrics, found {found}"
            ) from error
        pages = [metrics.parse(answer.text)] if answer.status_code == 200 else []
        return Counts(
            served=metrics.total(pages, self.counters.served),
            kv_tokens=metrics.total(pages, self.counters.kv_tokens),
            kv_bytes=metrics.total(pages, self.counters.kv_bytes),
        )

    async def counted_since(self, before: Counts) -> Counts:
        """Return what it has counted since `before`, once a request is counted completely."""

        async def since() -> Counts:
            return (await self.counts()).since(before)

        counts = await counted(since, Counts.is_complete, self.patience)
        if not counts.is_complete():
            self.patience = IMPATIENT_S
        return counts

    def failed(self, message: str, hint: str | None = None) -> SmokeTestFailed:
        """Make the error for what was found at this server."""
        return SmokeTestFailed(
            message,
            host=self.where,
            instance=self.instance.name,
            hint=hint or f"see the log of {self.instance.name}",
        )

    def refused(self, expected: str, found: NoAnswer) -> SmokeTestFailed:
        """Make the error for an answer that did not come."""
        return self.failed(f"expected {expected} from {self.url}{COMPLETIONS}, found {found}")


@dataclass(frozen=True)
class Servers:
    """All API servers, prefill's in the order of the topology, then decode's."""

    prefill: tuple[Server, ...]
    decode: tuple[Server, ...]

    @property
    def all(self) -> tuple[Server, ...]:
        """Prefill's and decode's."""
        return self.prefill + self.decode

    async def counts(self) -> list[Counts]:
        """Counters of all, in the same order."""
        return await together(server.counts() for server in self.all)


@asynccontextmanager
async def reached(session: Session) -> AsyncIterator[Servers]:
    """Connect to the service's API servers, each through its own host."""
    async with AsyncExitStack() as stack:
        servers = [
            Server(
                instance=instance,
                port=port,
                client=await stack.enter_async_context(
                    session.host_of(instance.name).http(
                        instance.address, port, headers=session.authorization
                    )
                ),
                counters=session.engine.COUNTERS,
                timeout=session.deployment.gates.smoke,
                where=session.host_of(instance.name).where,
            )
            for instance in session.topology.instances
            for port in instance.api_ports
        ]
        prefill = tuple(server for server in servers if server.instance.role == "prefill")
        decode = tuple(server for server in servers if server.instance.role == "decode")
        yield Servers(prefill, decode)


async def counted(
    read: Callable[[], Awaitable[T]], enough: Callable[[T], bool], patience: float
) -> T:
    """Call `read` until its result is enough, or time is up, and return the result: servers count a
    request a little later than they answer it.

    Args:
        patience: seconds.
    """
    deadline = time.monotonic() + patience
    # An asyncio.Event can't be set from another machine
    while not enough(result := await read()) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(POLL_INTERVAL_S)
    return result


def not_counted(counters: Counters, servers: Servers, now: Sequence[Counts]) -> str:
    """Why the counters can't prove that KV moved; empty if they can.

    Args:
        now: counters of all servers, in their order, read after each of them has served.
    """
    count = len(servers.prefill)
    of = {
        "prefill": list(zip(servers.prefill, now[:count], strict=True)),
        "decode": list(zip(servers.decode, now[count:], strict=True)),
    }
    needed = [
        ("prefill", "served", counters.served),
        ("decode", "served", counters.served),
        ("decode", "kv_tokens", counters.kv_tokens),
    ]
    if counters.kv_bytes_of == "prefill":
        needed.append(("prefill", "kv_bytes", counters.kv_bytes))
    for role, kind, counter in needed:
        if all(getattr(counts, kind) is None for _, counts in of[role]):
            names = list(dict.fromkeys(server.instance.name for server, _ in of[role]))
            return f"{', '.join(names)} count{'' if names[1:] else 's'} no {counter.name}"
    return ""


def _grown(now: float | None, before: float | None) -> float | None:
    return None if now is None else now - (before or 0)
