"""`kv_parallel_size` of omni-infer, whose meaning depends on the image's age. Pure.

Until 2025-08-12 the engine reads it as the number of prefill pods plus one, from 2025-08-13 on
(releases: from 0.4.0 on) as decode's tensor parallel size. With the other number all links form and
all counters grow, but decode reads the KV of other heads and answers garbage (contract section
1.4): so a value is refused where it is not the image's, or where the image's can't be told.
"""

from collections.abc import Iterator
from datetime import date

from pd_deploy.config.fields import archive_of, split_image
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.engines.base import Finding
from pd_deploy.engines.omniinfer import image_age
from pd_deploy.errors import Problem

_OLD, _NEW = "prefill-pods-plus-one", "decode-tensor-parallel"
CHANGE = image_age.Change(day=date(2025, 8, 13), version=(0, 4, 0))
"""When the engine began to read the size as decode's tensor parallel size."""


def size(deployment: Deployment, topology: Topology) -> int:
    """Return the size that every instance is given. `by-image` without a known age, which the rule
    has to allow, takes the later meaning."""
    value = deployment.kv_parallel_size
    if value == "by-image":
        return _number(_meaning(deployment) or _NEW, topology)
    return _number(value, topology)


def findings(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    """Yield a size that is not the image's, or `by-image` where the tag does not tell the age."""
    value, meaning = deployment.kv_parallel_size, _meaning(deployment)
    if value == "by-image" and meaning is None:
        yield "kv-parallel-size", Problem("kv_parallel_size", _untold(deployment))
    if value == "by-image" or meaning is None:
        return
    actual, expected = _number(value, topology), _number(meaning, topology)
    if actual != expected:
        when = "before 2025-08-13" if meaning == _OLD else "on 2025-08-13 or later"
        message = (
            f"expected {meaning} ({expected}) for the image {split_image(deployment.image).tag}, "
            f"built {when}, found {_shown(value, actual)}: decode would read the KV of other heads "
            "and answer garbage; remove the key, its default is by-image"
        )
        yield "kv-parallel-size", Problem("kv_parallel_size", message)


def _meaning(deployment: Deployment) -> str | None:
    tag = split_image(deployment.image).tag
    new = image_age.since(tag, CHANGE) if tag else None
    return None if new is None else _NEW if new else _OLD


def _number(value: str | int, topology: Topology) -> int:
    if isinstance(value, int):
        return value
    return topology.decode[0].tensor_parallel if value == _NEW else len(topology.prefill) + 1


def _untold(deployment: Deployment) -> str:
    tag = split_image(deployment.image).tag
    name = "a file" if archive_of(deployment.image) else "a digest"
    reference = f"the tag {tag}, which does not tell the image's age" if tag else name
    return (
        f"expected an image whose tag tells when it was built, found {reference}; give "
        f"`kv_parallel_size: {_OLD}` (built before 2025-08-13) or "
        f"`kv_parallel_size: {_NEW}` (built later)"
    )


def _shown(value: str | int, number: int) -> str:
    return str(value) if isinstance(value, int) else f"{value} ({number})"
