"""The cluster's registry as its HTTP API has it."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx

from pd_deploy.registry.client import Registry
from pd_deploy.registry.repository import Repository
from tests.memory.machine import Cluster


def _unread(
    body: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """An answer whose body is still to come."""
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body.encode()))


def reaching(cluster: Cluster) -> object:
    """What takes the place of `reach`: the real client over a transport in memory."""

    def answer(request: httpx.Request) -> httpx.Response:
        if cluster.registry_down:
            raise httpx.ConnectError("connection refused")
        pushed = {
            ref: build
            for ref, build in cluster.registry.items()
            if ref.startswith(f"{request.url.host}/") and "@" not in ref
        }
        path = request.url.path
        if path == "/v2/":
            return _unread("{}")
        if path.endswith("/tags/list"):
            of = f"{request.url.host}/{path.removeprefix('/v2/').removesuffix('/tags/list')}"
            named = [ref.rpartition(":") for ref in pushed]
            return _unread(json.dumps({"tags": [tag for name, _, tag in named if name == of]}))
        repository, _, tag = path.removeprefix("/v2/").partition("/manifests/")
        build = pushed.get(f"{request.url.host}/{repository}:{tag}")
        if build is None:
            return _unread('{"errors": [{"code": "MANIFEST_UNKNOWN"}]}', 404)
        return _unread("", headers={"docker-content-digest": build.digest})

    def connect(_host: str, _port: int) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer))

    @asynccontextmanager
    async def reach(place: Repository, **_: object) -> AsyncIterator[Registry]:
        async with Registry(place, connect) as registry:
            await registry.ping()
            yield registry

    return reach
