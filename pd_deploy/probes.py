"""Asking the service itself: is an instance ready, does a completion come through the proxy."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx

from pd_deploy import containers, kv_proof
from pd_deploy.deployment import Deployment
from pd_deploy.errors import NotReady, SmokeTestFailed
from pd_deploy.hosts import Host
from pd_deploy.kv_proof import Answer, Proof
from pd_deploy.report import Report
from pd_deploy.rollout import Rollout
from pd_deploy.topology import Proxy

POLL_INTERVAL_S = 0.25
PROBE_TIMEOUT_S = 5.0
DEATH_NOTICED_S = 2.0
PATIENCE_S = 5.0
"""How long a host may be away before the step says so and is retried."""


@dataclass(frozen=True)
class Completion:
    """The completion that proved the service, how long it took, and whether its KV was seen to
    come from a prefill."""

    url: str
    prompt: str
    text: str
    seconds: float
    proof: Proof


async def until_ready(rollout: Rollout, instance: str) -> Report:
    """Waits until an instance answers on its health endpoint.

    The wait ends at once when its container ends, or when another step fails.

    Raises:
        InstanceDied: the server ended while loading; with the last lines of its log.
        NotReady: the time is over.
        Abandoned: another step failed.
    """
    site = rollout.site
    await site.barrier.unless_failed(_answers_or_ends(rollout, instance))
    return Report("ready", instance, site.topology.host_of(instance), False, "healthy")


async def smoke_test(rollout: Rollout) -> Completion:
    """Asks the proxy for completions, as a client would, follows their KV, and sees that nobody
    died of it.

    Raises:
        SmokeTestFailed: no answer, an error, an answer of another shape, or KV that did not move.
        InstanceDied: a server or the proxy has ended since it was ready.
    """
    try:
        completion = await _complete(rollout)
    except SmokeTestFailed as error:
        # Its proxy notices a server's death before its container has ended.
        if dead := await containers.any_dead(rollout, within=DEATH_NOTICED_S):
            raise dead from error
        raise
    if dead := await containers.any_dead(rollout):
        raise dead
    return completion


def smoke_request(deployment: Deployment, proxy: Proxy) -> tuple[str, dict[str, object]]:
    """URL and body of the completion that proves the service."""
    body: dict[str, object] = {
        "model": deployment.model.served_name,
        "prompt": deployment.smoke.prompt,
        "max_tokens": deployment.smoke.max_tokens,
        "temperature": 0,
    }
    return f"http://{proxy.address}:{proxy.port}/v1/completions", body


async def _complete(rollout: Rollout) -> Completion:
    deployment, proxy = rollout.site.deployment, rollout.site.topology.proxy
    url, body = smoke_request(deployment, proxy)
    async with rollout.site.host(proxy.host).http(proxy.address, proxy.port) as client:

        async def ask(nonce: str) -> Answer:
            request, begin = body | rollout.site.engine.unseen(nonce), time.monotonic()
            try:
                answer = await client.post(url, json=request, timeout=deployment.gates.smoke)
            except httpx.HTTPError as error:
                found = f"no answer ({error or type(error).__name__})"
                raise _smoke_failed(rollout, found) from error
            return _read(rollout, answer, time.monotonic() - begin)

        answer, proof = await kv_proof.prove(rollout, ask)
    return Completion(url, deployment.smoke.prompt, answer.text, answer.seconds, proof)


def _read(rollout: Rollout, answer: httpx.Response, seconds: float) -> Answer:
    if answer.status_code != 200:
        raise _smoke_failed(rollout, f"status {answer.status_code}: {answer.text[:300]!r}")
    try:
        document: Any = answer.json()
        choice = document["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
        tokens = (document.get("usage") or {}).get("prompt_tokens")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _smoke_failed(rollout, f"{answer.text[:300]!r}") from None
    if not isinstance(text, str) or not text.strip() or reason not in ("stop", "length"):
        raise _smoke_failed(rollout, f"the text {text!r} that ended because of {reason!r}")
    return Answer(text, tokens if isinstance(tokens, int) else None, seconds)


def _smoke_failed(rollout: Rollout, found: str) -> SmokeTestFailed:
    proxy = rollout.site.topology.proxy
    return SmokeTestFailed(
        f"expected a completion from http://{proxy.address}:{proxy.port}/v1/completions, "
        f"found {found}",
        host=rollout.site.host(proxy.host).where,
        instance=proxy.name,
        hint=f"the instances' logs are in {rollout.site.deployment.paths.logs} on their hosts",
    )


async def _answers_or_ends(rollout: Rollout, instance: str) -> None:
    host, state = rollout.site.host_of(instance), await containers.require(rollout, instance)
    limit = rollout.site.deployment.gates.ready
    ended = asyncio.ensure_future(host.engine.wait(state.id, patience=PATIENCE_S))
    healthy = asyncio.ensure_future(_healthy(rollout, instance))
    try:
        done, _ = await asyncio.wait(
            {ended, healthy}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        ended.cancel()
        healthy.cancel()
    if ended in done:
        ended.result()
        raise await containers.died(rollout, instance)
    if not done:
        raise NotReady(
            f"expected an answer on its health endpoint within {limit:g} s, found none\n"
            + await containers.last_lines(rollout, instance),
            host=host.where,
            instance=instance,
            hint="raise gates.ready if it only needs longer",
        )
    healthy.result()


async def _healthy(rollout: Rollout, instance: str) -> None:
    """Returns once all API servers of an instance answer 200 on /health. One without any is
    ready when its pod's master is."""
    pod = rollout.site.topology.pod_of(instance)
    place = next(member for member in pod.members if member.name == instance)
    answering = place if place.api_ports else pod.master
    host = rollout.site.host_of(answering.name)
    waits = [
        asyncio.ensure_future(_server_healthy(host, answering.address, port))
        for port in answering.api_ports
    ]
    try:
        await asyncio.gather(*waits)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _server_healthy(host: Host, address: str, port: int) -> None:
    async with host.http(address, port) as client:
        # An asyncio.Event can't be set from another machine
        while not await _answers(client, f"http://{address}:{port}/health"):  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL_S)


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url, timeout=PROBE_TIMEOUT_S)).status_code == 200
    except httpx.HTTPError:
        return False
