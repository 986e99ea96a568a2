"""Comparing what a deployment file renders with what the imported files describe. Pure.

Both sides are launchers' flags and variables, read by the same reader. Where they differ, the
report says so, whatever made the difference: that is how nothing changes unnoticed.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pd_deploy import engines
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Topology
from pd_deploy.engines.base import Engine, HostFacts, Layout, Service
from pd_deploy.importer import launcher, profile_choice
from pd_deploy.importer.report import Place, Report, is_secret
from pd_deploy.importer.source import Argument, Server, Source
from pd_deploy.importer.writing import Draft
from pd_deploy.planning import placement

_REASONS = {
    "PYTHONUNBUFFERED": "correction unbuffered-log",
    "max-num-batched-tokens": "correction batched-tokens",
    "gpu_memory_utilization": "correction prefill-memory",
    "HCCL_OP_EXPANSION_MOD": "correction expansion-mode: nothing reads that name",
    "HCCL_OP_EXPANSION_MODE": "correction expansion-mode",
    "decode_gear_list": "correction gear-list",
    "ASCEND_LAUNCH_BLOCKING": "correction launch-blocking",
    "engine_id": "correction engine-ids",
    "kv_parallel_size": "by the image's age (correction kv-parallel-size)",
    "kv_connector": "that of the image's contract",
    "kv_connector_extra_config": "differs between instances, or says where ranktables are",
    "kv_port": "derived: a pod's workers bind as many ports as it has devices on a host",
    "master port": "all instances of a pod have its master's",
    "api port": "pd-deploy's formula for `ports`",
    "zmq port": "pd-deploy's formula for `ports`",
    "kv_load_failure_policy": "contract v1: a request whose KV is lost fails, not the engine",
    "VLLM_PLUGINS": "what upstream's files for such images all set",
    "OMNI_VLLM_PATCHES": "what upstream's files for such images all set",
    "num-servers": "derived from devices and tensor parallel size",
    "num-dp": "derived from devices and tensor parallel size",
    "server-offset": "derived from devices and tensor parallel size",
}


class Difference(NamedTuple):
    """A value that is rendered otherwise; None where one side has none."""

    key: str
    before: object
    after: object


def compare(source: Source, originals: Mapping[str, Server], draft: Draft) -> None:
    """Enter every difference of what a draft renders from the originals into the report.

    Args:
        originals: servers as they were read, by name, before any value was changed.
    """
    servers = rendered(draft.deployment)
    _compare_derived(source, originals, servers, draft)
    found: dict[Difference, list[str]] = {}
    for name, original in originals.items():
        instance = draft.names[name]
        for difference in differences(original, servers[instance]):
            found.setdefault(difference, []).append(name)
    for difference, names in found.items():
        server = originals[names[0]]
        place = server.places.get(difference.key, server.place)
        is_added = difference.before is None and difference.key in _ADDED
        source.report.add(
            "derived" if is_added else "changed",
            place,
            f"{', '.join(names)}: {_shown(difference)}",
            _reason(difference.key, draft),
        )


def _compare_derived(
    source: Source,
    originals: Mapping[str, Server],
    servers: Mapping[str, Server],
    draft: Draft,
) -> None:
    """Name the variables and flags that follow from the topology and that only one side has."""
    for name, original in originals.items():
        made = servers[draft.names[name]]
        if new := sorted(made.derived - original.derived - _OF_CONTAINER):
            note = "pd-deploy sets them: from the topology, or see docs/corrections.md"
            source.report.add("derived", original.place, f"{name}: also {', '.join(new)}", note)
        if gone := sorted(original.derived - made.derived - _OF_CONTAINER):
            note = "not set: nothing of the contract reads them, or the container has them"
            source.report.add("implied", original.place, f"{name}: no {', '.join(gone)}", note)


# Given to the container, not exported by the start script.
_OF_CONTAINER = {"CODE_PATH", "LOG_PATH", "RANKTABLE_SAVE_PATH"}
_ADDED = ("master port", "api port", "zmq port")


def _shown(difference: Difference) -> str:
    key, before, after = difference
    before, after = (
        "none" if value is None else "(not shown)" if is_secret(key, value) else value
        for value in (before, after)
    )
    return f"{key} {before} → {after}"


def _reason(key: str, draft: Draft) -> str:
    last = key.rpartition(".")[2]
    reasons = {**_REASONS, **draft.reasons}
    return reasons.get(last, "pd-deploy's own: see docs/corrections.md")


def rendered(deployment: Deployment) -> dict[str, Server]:
    """Render a file's instances for hosts of invented interfaces and addresses, and read them as
    servers, by name."""
    topology = placement.derive(deployment)
    engine = engines.get(deployment.engine)
    service = Service(
        deployment,
        topology,
        Layout.of(deployment, "0001-00000000"),
        {name: HostFacts(entry.interface or "", {}) for name, entry in deployment.hosts.items()},
        deployment.image,
    )
    return dict(_read(service, topology, engine))


def _read(service: Service, topology: Topology, engine: Engine) -> Iterator[tuple[str, Server]]:
    quiet = Report()
    for i in topology.instances:
        place = Place(i.name, 0)
        server = Server(i.name, i.role, i.address, i.pod, i.devices, place, node_rank=i.node_rank)
        for name, value in engine.environment(service, i.name).items():
            launcher.take_environment(name, value, server, place, quiet)
        if i.api_ports:
            words = [Argument(word, place) for word in engine.command(service, i.name)[2:]]
            launcher.read(words, "", server, place, quiet)
        server.master_port, server.api_port = i.master_port, i.api_port
        server.zmq_port = i.zmq_port
        yield i.name, server


def differences(original: Server, made: Server) -> Iterator[Difference]:
    """Yield what one server has otherwise than the other."""
    before, after = table(original), table(made)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            if key in _LITERAL_ONLY and key not in before:
                continue
            if _follows_master(key, made, before, after):
                continue
            yield Difference(key, before.get(key), after.get(key))


_LITERAL_ONLY = ("num-servers", "num-dp", "server-offset", "kv_connector", "kv_buffer_device",
                 "kv_role", "kv_rank", "engine_id", "kv_parallel_size")  # fmt: skip


def _follows_master(
    key: str, made: Server, before: Mapping[str, object], after: Mapping[str, object]
) -> bool:
    """Tell whether a prefill's further host leaves a flag to its master, where all servers are."""
    return made.role == "prefill" and made.node_rank > 0 and key not in after


def table(server: Server) -> dict[str, object]:
    """Return all that a launcher gives an instance, by what it is called."""
    entries: dict[str, object] = {
        ".".join(path): str(value)
        for path, value in profile_choice.settings_of(server).items()
        if path != ("tensor_parallel",)
    }
    entries |= {
        "model path": server.model_path,
        "served name": server.served_name,
        "max-model-len": server.max_len,
        "tensor parallel": server.tensor_parallel,
        "master port": server.master_port,
        "api port": server.api_port,
        "zmq port": server.zmq_port,
    }
    entries |= {name: str(value) for name, value in server.literal.items()}
    entries |= {name: str(value) for name, value in server.kv.items()}
    return {key: value for key, value in entries.items() if value is not None}
