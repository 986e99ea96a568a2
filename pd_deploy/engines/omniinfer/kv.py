"""How an instance takes part in KV transfer, by the contract of its image. Pure.

`kv_parallel_size` is the risky one: until 2025-08-12 the engine reads it as the number of prefill
pods plus one, from 2025-08-13 on (releases: from 0.4.0 on) as decode's tensor parallel size. With
the other number all links form and all counters grow, but decode reads the KV of other heads and
answers garbage (contract section 1.4): so a value is refused where it is not the image's, or where
the image's can't be told. Later engines are given pods plus one again, and don't read it.
"""

from collections.abc import Iterator
from typing import Any

from pd_deploy.config.fields import archive_of, split_image
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Instance, Topology
from pd_deploy.engines.base import Finding, Service
from pd_deploy.engines.omniinfer.contracts import contract_of, expected
from pd_deploy.errors import Problem

_OLD, _NEW = "prefill-pods-plus-one", "decode-tensor-parallel"


def transfer_config(service: Service, instance: Instance) -> dict[str, Any]:
    """Write the configuration of an instance's connector (contract sections 4.2 and 9.3).

    A worker adds its rank on the host to `kv_port`. Where a transfer may fail its request, it does:
    computing the prompt again instead would hide the fault.
    """
    deployment = service.deployment
    contract, extra = contract_of(deployment), deployment.kv_connector_extra_config
    config: dict[str, Any] = {
        "kv_connector": contract.connector,
        "kv_buffer_device": contract.kv_buffer_device,
        "kv_role": "kv_producer" if instance.role == "prefill" else "kv_consumer",
        "kv_rank": instance.kv_rank,
        "engine_id": _engine_id(deployment, instance),
        "kv_parallel_size": size(deployment, service.topology),
        "kv_port": instance.zmq_port if contract.binds_kv_ports else None,
        "kv_load_failure_policy": contract.kv_load_failure_policy,
        "kv_connector_extra_config": extra or None,
    }
    return {key: value for key, value in config.items() if value is not None}


def size(deployment: Deployment, topology: Topology) -> int:
    """Return the size that every instance is given."""
    value = deployment.kv_parallel_size
    return _number(
        contract_of(deployment).kv_parallel_size if value == "by-image" else value, topology
    )


def findings(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    """Yield a size that is not the image's."""
    value, contract = deployment.kv_parallel_size, expected(deployment)
    if value == "by-image" or contract is None or not contract.has_ranktables:
        return
    meaning = contract.kv_parallel_size
    actual, right = _number(value, topology), _number(meaning, topology)
    if actual != right:
        message = (
            f"expected {meaning} ({right}) for {_named(deployment)}, "
            f"found {_shown(value, actual)}: decode would read the KV of other heads and answer "
            "garbage; remove the key, its default is by-image"
        )
        yield "kv-parallel-size", Problem("kv_parallel_size", message)


def untold(deployment: Deployment) -> Iterator[Finding]:
    """Yield `by-image` where neither the image nor its tag tells what it takes the number for."""
    if deployment.kv_parallel_size == "by-image" and expected(deployment) is None:
        yield "kv-parallel-size", Problem("kv_parallel_size", _untold(deployment))


def _engine_id(deployment: Deployment, instance: Instance) -> int | str | None:
    kind, choice = contract_of(deployment).engine_id, deployment.decode_engine_id
    if kind is None:
        return None
    number = instance.kv_rank if instance.role == "prefill" or choice == "kv-rank" else choice
    return str(number) if kind == "text" else number


def _number(value: str | int, topology: Topology) -> int:
    if isinstance(value, int):
        return value
    return topology.decode[0].tensor_parallel if value == _NEW else len(topology.prefill) + 1


def _named(deployment: Deployment) -> str:
    """Name the image as far as it decides the size."""
    if deployment.contract != "by-image":
        return f"an image of contract {deployment.contract}"
    early = contract_of(deployment).kv_parallel_size == _OLD
    when = "before 2025-08-13" if early else "on 2025-08-13 or later"
    return f"the image {split_image(deployment.image).tag}, built {when}"


def _untold(deployment: Deployment) -> str:
    tag = split_image(deployment.image).tag
    name = "a file" if archive_of(deployment.image) else "a digest"
    reference = f"the tag {tag}, which does not tell the image's age" if tag else name
    return (
        f"expected an image whose tag tells when it was built, found {reference}; give "
        "`contract: v0-early` (built before 2025-08-13), `v0` (until March 2026), `v1` or `roles` "
        "(see omni-infer-contract.md)"
    )


def _shown(value: str | int, number: int) -> str:
    return str(value) if isinstance(value, int) else f"{value} ({number})"
