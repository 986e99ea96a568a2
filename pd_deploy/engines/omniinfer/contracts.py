"""What images of each age expect of their deployer. Pure.

v0-early   until 2025-08-12: vLLM 0.9, ranktables, kv_parallel_size = prefill pods + 1
v0         until March 2026: the same, kv_parallel_size = decode's tensor parallel size
v1         from February 2026: vLLM 0.12 and later, no ranktables, devices renumbered by the
           launcher unless it is told not to
roles      from July 2026: as v1, with other script directories and omni_proxy alone
"""

from dataclasses import dataclass
from datetime import date

from pd_deploy.config.fields import split_image
from pd_deploy.config.models import ContractName, Deployment
from pd_deploy.engines.omniinfer import image_age


@dataclass(frozen=True)
class Contract:
    """What an image of one age expects of its deployer."""

    name: ContractName


CONTRACTS: dict[ContractName, Contract] = {
    "v0-early": Contract("v0-early"),
    "v0": Contract("v0"),
    "v1": Contract("v1"),
    "roles": Contract("roles"),
}
_V0 = image_age.Change(day=date(2025, 8, 13), version=(0, 4, 0))


def expected(deployment: Deployment) -> Contract | None:
    """Return the contract that the file names, or that of the image's age as far as its tag tells
    one; None if neither does."""
    if deployment.contract != "by-image":
        return CONTRACTS[deployment.contract]
    tag = split_image(deployment.image).tag
    new = image_age.since(tag, _V0) if tag else None
    return None if new is None else CONTRACTS["v0" if new else "v0-early"]


def contract_of(deployment: Deployment) -> Contract:
    """Return the contract by which a deployment is rendered: v0 where none is known."""
    return expected(deployment) or CONTRACTS["v0"]
