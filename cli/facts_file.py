"""Planning offline: read from a file what hosts and registry would report."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pd_deploy import engines
from pd_deploy.config import text_files
from pd_deploy.config.fields import Address, Text, Word
from pd_deploy.config.models import Deployment
from pd_deploy.config.problems import problems_of
from pd_deploy.engines.base import HostFacts
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.planning import actions, placement, plans
from pd_deploy.planning.plans import STAGES
from pd_deploy.records import releases


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FactsOfHost(_Strict):
    """What one host would report."""

    interface: Text
    device_addresses: dict[int, Address] = {}
    route_address: Address | None = Field(
        default=None, description="On its default route; else the address in the deployment file."
    )


class FactsFile(_Strict):
    """What the hosts and the registry would report."""

    hosts: dict[str, FactsOfHost]
    image: Word | None = Field(default=None, description="By digest; else the file's reference.")
    generations: list[str] = Field(default=[], description="Generations already on the hosts.")


def make_plan(deployment: Deployment, path: Path) -> plans.Plan:
    """Make a plan from a facts file.

    Raises:
        InvalidInput: the facts file is wrong, or lacks hosts or devices.
        FactsError: devices share an address, or hosts announce another than the file's.
    """
    facts = _read(path)
    placed, engine = placement.build(deployment), engines.get(deployment.engine)
    missing = [
        Problem(f"hosts.{host}", "is missing")
        for host in deployment.hosts
        if host not in facts.hosts
    ]
    missing += [
        Problem(f"hosts.{i.host}.device_addresses.{device}", f"is missing; {i.name} uses it")
        for i in placed.instances
        if i.host in facts.hosts and engine.read_addresses_command(deployment, i.devices)
        for device in i.devices
        if device not in facts.hosts[i.host].device_addresses
    ]
    if missing:
        raise InvalidInput(missing, source=str(path))
    host_facts = {
        name: HostFacts(
            facts.hosts[name].interface,
            facts.hosts[name].device_addresses,
            facts.hosts[name].route_address or entry.address,
        )
        for name, entry in deployment.hosts.items()
    }
    engine.check_facts(deployment, host_facts)
    made = plans.make(
        deployment,
        placed,
        engine,
        facts=host_facts,
        pinned_image=facts.image or deployment.image_reference,
        history=releases.merge((), (), facts.generations),
    )
    return actions.with_actions(made.plan, {}, {}, {}, [], STAGES)


def _read(path: Path) -> FactsFile:
    try:
        return FactsFile.model_validate_json(text_files.read(path))
    except ValidationError as error:
        raise InvalidInput(problems_of(error, FactsFile), source=str(path)) from error
