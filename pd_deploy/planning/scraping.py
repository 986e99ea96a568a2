"""What Prometheus is to scrape of a service, as its file-based service discovery reads it. Pure."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pd_deploy import engines
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology


def groups(
    deployment: Deployment, topology: Topology, generation: str | None = None
) -> list[dict[str, Any]]:
    """List the servers' pages of metrics, and proxies' if they have one that can be reached.

    Labels: `deployment`, `generation` if it is given, `role` (prefill, decode, proxy), `host` and
    `instance` by their names in the file, and `server`, `address:port`, because an instance may
    have several. A pod's members without an API server have no page.
    """
    common = {"deployment": deployment.name}
    if generation is not None:
        common["generation"] = generation
    return [
        {"targets": [labels["server"]], "labels": {**common, **labels}}
        for labels in _labels(deployment, topology)
    ]


def text(groups: list[dict[str, Any]]) -> str:
    """Write targets as Prometheus reads them."""
    return json.dumps(groups, indent=2) + "\n"


def _labels(deployment: Deployment, topology: Topology) -> Iterator[Mapping[str, str]]:
    for member in topology.instances:
        for server in member.servers:
            names = {"role": member.role, "instance": member.name, "host": member.host}
            yield {**names, "server": server}
    for proxy in topology.proxies:
        if page := engines.get(deployment.engine).proxy_metrics(deployment, proxy):
            names = {"role": "proxy", "instance": proxy.name, "host": proxy.host}
            yield {**names, "server": page.server, "__metrics_path__": page.path}
