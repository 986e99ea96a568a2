"""The proof that an adopted service serves: a completion where clients ask."""

import asyncio
import time
from typing import Any

from pd_deploy.errors import SmokeTestFailed
from pd_deploy.hosts.concurrent import together
from pd_deploy.records.adopted import AdoptedContainer, AdoptedService
from pd_deploy.steps import adopting
from pd_deploy.steps.report import Report
from pd_deploy.steps.session import Session
from pd_deploy.steps.verify import requests
from pd_deploy.steps.verify.answers import NoAnswer, ask

POLL_S = 0.5


def body(session: Session, service: AdoptedService) -> dict[str, Any]:
    """Build the body of the completion that a client of the adopted service would ask for."""
    smoke = session.deployment.smoke
    body = requests.prompt(session.deployment, smoke.prompt, smoke.max_tokens)
    return body | {"model": service.model}


async def prove(session: Session, service: AdoptedService) -> Report:
    """Ask each of the adopted service's proxies for a completion.

    Raises:
        SmokeTestFailed: none came from one of them.
    """
    proven = await together(_prove(session, service, proxy) for proxy in service.proxies)
    name, where = session.deployment.name, adopting.host_of(session, service.proxies[0]).name
    return Report("prove adopted", name, where, False, f"serves at {'; '.join(proven)}")


async def _prove(session: Session, service: AdoptedService, proxy: AdoptedContainer) -> str:
    """Ask a proxy for a completion, until one comes or `gates.start` is over; return what came."""
    gates, smoke = session.deployment.gates, session.deployment.smoke
    host, port = adopting.host_of(session, proxy), service.port_of(proxy)
    url, question = f"http://{host.address}:{port}{requests.COMPLETIONS}", body(session, service)
    deadline = time.monotonic() + gates.start
    while True:
        try:
            async with host.http(host.address, port, headers=session.authorization) as client:
                answer = await ask(client, url, question, timeout=gates.smoke)
            if answer.text.strip():
                break
            why = f"the text {answer.text!r}"
        except NoAnswer as error:
            why = str(error)
        if time.monotonic() >= deadline:
            raise SmokeTestFailed(
                f"expected a completion of the adopted service at {url}, found {why}",
                host=host.where,
                instance=proxy.instance,
            )
        await asyncio.sleep(POLL_S)
    return f"{url}, which answered {smoke.prompt!r} with {answer.text[:80]!r}"
