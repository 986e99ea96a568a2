"""The documented 3P1D service, and ways to change it: what the unit tests start from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pd_deploy import engines
from pd_deploy.config import yaml_files
from pd_deploy.config.load import parse_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.config.yaml_files import merge
from pd_deploy.engines.base import HostFacts, Layout, Service
from pd_deploy.planning import placement, plans
from pd_deploy.planning.plans import Made, Plan
from pd_deploy.records import releases
from pd_deploy.records.releases import History

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deployments" / "qwq-3p1d.yaml"
GOLDEN: dict[str, Any] = json.loads((ROOT / "tests/data/golden-3p1d.json").read_text())
IMAGE = "registry.example/omni@sha256:" + "0" * 64
GENERATION = "1-0123abcd"
INTERFACE = "enp23s0f3"
_DOCUMENT = yaml.safe_load(FILE.read_text())


def document(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The example's document with changes merged in; null removes a key."""
    return merge(_DOCUMENT, changes or {})


def service(changes: Mapping[str, Any] | None = None) -> Deployment:
    """The example as a deployment."""
    return parse_deployment(document(changes))


def place(changes: Mapping[str, Any] | None = None) -> Topology:
    """The example's topology."""
    return placement.build(service(changes))


def addresses(of: Deployment) -> dict[str, dict[int, str]]:
    """Device addresses as in the golden file: 192.168.<last octet of the host>.<100 + device>."""
    return {
        name: {d: f"192.168.{host.address.rsplit('.', 1)[1]}.{100 + d}" for d in range(16)}
        for name, host in of.hosts.items()
    }


def facts(of: Deployment, interface: str = INTERFACE) -> dict[str, HostFacts]:
    """What the hosts would say."""
    return {name: HostFacts(interface, known) for name, known in addresses(of).items()}


def for_engine(changes: Mapping[str, Any] | None = None, interface: str = INTERFACE) -> Service:
    """The example as an engine is given it."""
    of = service(changes)
    layout = Layout.of(of, GENERATION)
    return Service(of, placement.build(of), layout, facts(of, interface), IMAGE)


def plan_of(path: Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """The plan of another file, with changes merged in."""
    return made(parse_deployment(merge(yaml_files.read(path), changes or {}))).plan


def made(of: Deployment, history: History | None = None) -> Made:
    """What is made of a deployment, by what its hosts would say."""
    return plans.make(
        of,
        placement.build(of),
        engines.get(of.engine),
        facts=facts(of),
        pinned_image=IMAGE,
        history=history or past(),
    )


def past(generations: Sequence[str] = ()) -> History:
    """A history in which nothing is known of these generations but their names."""
    return releases.merge((), (), generations)


def plan(
    changes: Mapping[str, Any] | None = None,
    *,
    pinned_image: str = IMAGE,
    generations: list[str] | None = None,
    known: dict[str, HostFacts] | None = None,
    history: History | None = None,
) -> Plan:
    """The example's plan."""
    of = service(changes)
    return plans.make(
        of,
        placement.build(of),
        engines.get(of.engine),
        facts=known or facts(of),
        pinned_image=pinned_image,
        history=history or past(generations or []),
    ).plan
