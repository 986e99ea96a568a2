"""The proof that an adopted service serves: a completion where clients ask."""

import asyncio
import time
from typing import Any

from pd_deploy.errors import SmokeTestFailed
from pd_deploy.records.adopted import AdoptedService
from pd_deploy.steps import adopting
from pd_deploy.steps.report import Report
from pd_deploy.steps.session import Session
from pd_deploy.steps.verify import requests
from pd_deploy.steps.verify.answers import NoAnswer, ask

POLL_S = 0.5


def completion(session: Session, service: AdoptedService) -> tuple[str, dict[str, Any]]:
    """URL and body of the completion that a client of the adopted service would ask for."""
    smoke = session.deployment.smoke
    url = f"http://{service.proxies[0].host}:{service.port}{requests.COMPLETIONS}"
    body = requests.prompt(session.deployment, smoke.prompt, smoke.max_tokens)
    return url, body | {"model": service.model}


async def prove(session: Session, service: AdoptedService) -> Report:
    """Ask the adopted service's proxy for a completion, until one comes or `gates.start` is over.

    Raises:
        SmokeTestFailed: none came.
    """
    gates, smoke = session.deployment.gates, session.deployment.smoke
    host = adopting.host_of(session, service.proxies[0])
    url, body = completion(session, service)
    deadline = time.monotonic() + gates.start
    while True:
        try:
            async with host.http(host.address, service.port) as client:
                answer = await ask(client, url, body, timeout=gates.smoke)
            if answer.text.strip():
                break
            why = f"the text {answer.text!r}"
        except NoAnswer as error:
            why = str(error)
        if time.monotonic() >= deadline:
            raise SmokeTestFailed(
                f"expected a completion of the adopted service at {url}, found {why}",
                host=host.where,
                instance=service.proxies[0].instance,
            )
        await asyncio.sleep(POLL_S)
    detail = f"serves at {url}, which answered {smoke.prompt!r} with {answer.text[:80]!r}"
    return Report("prove adopted", session.deployment.name, host.name, False, detail)
