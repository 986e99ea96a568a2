"""Which contract an image follows, by what it says of itself. Pure, but for the source of what is
asked, which is read when this is imported."""

import re
from collections.abc import Iterator
from importlib import resources

from pd_deploy.config.fields import split_image
from pd_deploy.config.models import ContractName, Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.engines import image_facts
from pd_deploy.engines.base import Finding
from pd_deploy.engines.image_facts import ImageFacts, brief
from pd_deploy.engines.omniinfer import contracts, kv
from pd_deploy.engines.omniinfer.in_image import LAUNCHER, MARK
from pd_deploy.engines.python import in_python
from pd_deploy.errors import Problem, UnknownImage

_SOURCE = resources.files(__package__).joinpath("in_image.py").read_text()
_RENUMBERS = "--use-inventory-devices"  # what launchers take that otherwise number devices anew
_V0: frozenset[ContractName] = frozenset({"v0-early", "v0"})
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_OF_ALL_BUILDS = "0.1.0"  # what the sources say in every release; some images say more
_OF_MEANING: dict[str, ContractName] = {
    "prefill pods + 1": "v0-early",
    "decode's tensor parallel size": "v0",
}


def probe_command() -> list[str]:
    """Return the command that prints, in a container of an image, what the image is."""
    return in_python(_SOURCE)


def parse_probe(output: str) -> ImageFacts:
    """Parse what this command printed.

    Raises:
        ValueError: it is no answer; says what it is instead.
    """
    return image_facts.parse(output, MARK)


def candidates(facts: ImageFacts) -> frozenset[ContractName]:
    """List the contracts that an image may follow by what it says of itself; none where nobody
    knows one like it."""
    if LAUNCHER not in facts.programs:
        return frozenset()
    renumbers = _RENUMBERS in facts.flags.get(LAUNCHER, ())
    named = set(facts.connectors)
    links_on_demand = "LLMDataDistConnector" in named if named else renumbers
    links_at_start = "AscendHcclConnectorV1" in named if named else not renumbers
    if facts.script_directory.endswith("/tools/deploy/start_server"):
        has_proxy = "omni_proxy.sh" in facts.programs
        return frozenset({"roles"}) if links_on_demand and has_proxy else frozenset()
    if not facts.programs.keys() & {"global_proxy.sh", "omni_proxy.sh"}:
        return frozenset()
    if links_on_demand and (renumbers or not links_at_start):
        return frozenset({"v1"})
    if links_at_start and facts.kv_parallel_size:
        return frozenset({_OF_MEANING[facts.kv_parallel_size]})
    return _V0 if links_at_start else frozenset()


def _of_version(facts: ImageFacts) -> frozenset[ContractName]:
    """List the contracts of an image by its version, which is less sure than what its tag tells."""
    version = _VERSION.match(facts.packages.get("omni-infer", ""))
    if version is None or version[0] == _OF_ALL_BUILDS:
        return _V0
    early = tuple(map(int, version.groups())) < contracts.NEW_KV_PARALLEL_SIZE.version
    return frozenset({"v0-early" if early else "v0"})


def for_image(deployment: Deployment, facts: ImageFacts) -> Deployment:
    """Return a deployment as it is rendered for an image with these facts: the file's contract, or
    else the image's.

    Raises:
        UnknownImage: nobody knows what an image like this expects, nor does the file say so.
    """
    if deployment.contract != "by-image":
        return deployment
    possible = candidates(facts)
    if not possible:
        raise UnknownImage(
            f"expected an image that follows one of the contracts "
            f"{', '.join(contracts.CONTRACTS)}; found {deployment.image} with {brief(facts)}",
            hint="nothing was stopped. Update pd-deploy, or use another image; if you know which "
            "contract it follows, name that in the file (`contract: …`)",
        )
    by_tag = contracts.possible(split_image(deployment.image).tag or "")
    names = possible & by_tag or possible
    if len(names) > 1:
        names = names & _of_version(facts) or names
    # Else both read ranktables, and take `kv_parallel_size` for different things: see `kv`.
    name = next(iter(names)) if len(names) == 1 else "by-image"
    return deployment.model_copy(update={"contract": name})


def image_findings(
    deployment: Deployment, _: Topology, facts: ImageFacts | None
) -> Iterator[Finding]:
    """Demand that the contract in the file is that of the image, and that it is known what the
    image takes `kv_parallel_size` for."""
    if facts is None:
        yield from contracts.findings(deployment)
        return
    yield from kv.untold(deployment)
    possible = candidates(facts)
    if deployment.contract == "by-image" or not possible or deployment.contract in possible:
        return
    listed = " or ".join(name for name in contracts.CONTRACTS if name in possible)
    message = f"expected {listed}, as the image has {brief(facts)}; found {deployment.contract}"
    yield "contract-of-image", Problem("contract", message)
