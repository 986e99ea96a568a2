"""The rules that a service has to keep: their names, and what of a deployment breaks them. Pure.

Here are those of every service; an engine adds its own. A file may break a rule on purpose:
`allow: [rule-name]`.
"""

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from pydantic import BaseModel

from pd_deploy import engines
from pd_deploy.config.models import Deployment, ProxyEntry, Settings
from pd_deploy.config.topology import Pod, Proxy, Topology
from pd_deploy.engines.base import Finding
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.errors import Problem

RESERVED_NAMES = {"ranktables"}


def broken(
    deployment: Deployment, topology: Topology, images: Iterable[ImageFacts] = ()
) -> list[Problem]:
    """List every broken rule that the file does not allow, and every one that it can't allow.

    Each problem names its rule.
    """
    problems = list(_names(topology))
    engine = engines.get(deployment.engine)
    asked: list[ImageFacts | None] = [*images] or [None]
    of_image = (
        finding for facts in asked for finding in engine.image_findings(deployment, topology, facts)
    )
    of_code = _other_commits(deployment, {facts.commit for facts in asked if facts})
    for rule, problem in chain(_findings(deployment, topology), of_image, of_code):
        if rule not in deployment.allow:
            problems.append(Problem(problem.key, f"{problem.message} (rule {rule})"))
    return problems


def _findings(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    yield from _shared_addresses(deployment)
    yield from _shared_devices(topology)
    yield from _shared_ports(topology)
    yield from _shared_paths(deployment)
    yield from _pods(deployment, topology)
    yield from _device_ids(deployment, topology)
    yield from _overrides_of_proxy(deployment, topology)
    for pod in topology.pods:
        yield from _spanning(deployment, pod)
        yield from _devices_of_pod(pod)
        yield from _overrides(deployment, pod)
        yield from _keys(pod.key, pod.master.settings)
    yield from _unused(deployment)
    yield from _benchmark(deployment, topology)
    yield from engines.get(deployment.engine).findings(deployment, topology)


def _names(topology: Topology) -> Iterator[Problem]:
    for name, count in Counter(topology.names).items():
        if count > 1:
            yield Problem(name, "expected a name used once among prefill, decode and proxy")
        if name in RESERVED_NAMES:
            yield Problem(name, "expected another name; it is that of the ranktables' directory")


def _shared_addresses(deployment: Deployment) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for name, entry in deployment.hosts.items():
        if entry.address in seen:
            yield (
                "host-addresses",
                Problem(
                    f"hosts.{name}",
                    f"expected an address of its own, found {entry.address}, "
                    f"which host {seen[entry.address]} has",
                ),
            )
        seen.setdefault(entry.address, name)


def _shared_devices(topology: Topology) -> Iterator[Finding]:
    holder: dict[tuple[str, int], str] = {}
    for instance in topology.instances:
        taken = {
            d: holder[instance.host, d] for d in instance.devices if (instance.host, d) in holder
        }
        for other in sorted(set(taken.values())):
            devices = ", ".join(str(d) for d, name in taken.items() if name == other)
            yield (
                "devices-disjoint",
                Problem(
                    f"{instance.key}.devices",
                    f"expected devices of its own on host {instance.host}, "
                    f"found {devices}, which {other} has",
                ),
            )
        holder |= {(instance.host, d): instance.name for d in instance.devices if d not in taken}


def _shared_ports(topology: Topology) -> Iterator[Finding]:
    holder: dict[tuple[str, int], str] = {}
    for proxy in topology.proxies:
        yield from _shared_ports_of(proxy, holder)
    for instance in topology.instances:
        for purpose, port in instance.ports.items():
            endpoint = (instance.host, port)
            if port > 65535:
                message = f"{purpose} port of {instance.name} would be {port}, above 65535"
                yield "ports-in-range", Problem("ports", message)
            if endpoint in holder:
                message = f"its {purpose} port {port} on host {instance.host} is also"
                yield "ports-distinct", Problem(instance.key, f"{message} {holder[endpoint]}")
            holder.setdefault(endpoint, f"the {purpose} port of {instance.name}")


def _shared_ports_of(proxy: Proxy, holder: dict[tuple[str, int], str]) -> Iterator[Finding]:
    """Find ports of a proxy that itself or one before it has on its host; enter its own."""
    of_it = dict[tuple[str, int], str]()
    for purpose, port in proxy.ports.items():
        shown = f"the {'' if purpose == 'service' else f'{purpose} '}port of proxy {proxy.name}"
        if (proxy.host, port) in of_it:
            message = f"expected {shown} not to be {port}, as is its own"
            yield "ports-distinct", Problem(f"proxy.{proxy.name}", message)
        elif (proxy.host, port) in holder:
            message = f"expected {shown} not to be {port}, which on host {proxy.host} is"
            other = holder[proxy.host, port]
            yield "ports-distinct", Problem(f"proxy.{proxy.name}", f"{message} {other}")
        of_it[proxy.host, port] = shown
    for endpoint, shown in of_it.items():
        holder.setdefault(endpoint, shown)


def _shared_paths(deployment: Deployment) -> Iterator[Finding]:
    paths = deployment.paths
    if posixpath.normpath(paths.state) == posixpath.normpath(paths.logs):
        message = (
            f"expected another directory than paths.state, found {paths.logs}: containers may "
            "not write to the directory of the state"
        )
        yield "paths-apart", Problem("paths.logs", message)


def _pods(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    count, ports = len(topology.prefill), deployment.ports
    if count > ports.decode_offset:
        message = (
            f"expected at least the number of prefill pods ({count}), "
            f"found {ports.decode_offset}: their ports would overlap decode's"
        )
        yield "ports-in-range", Problem("ports.decode_offset", message)


def _spanning(deployment: Deployment, pod: Pod) -> Iterator[Finding]:
    supports = deployment.supports
    prefill = pod.role == "prefill"
    supported = supports.multi_host_prefill != "none" if prefill else supports.multi_host_decode
    if len(pod.members) > 1 and not supported:
        starts = "no executor that spans hosts" if prefill else "a decode of one host only"
        message = f"expected one host, found {len(pod.members)}: profile {deployment.profile} "
        yield f"multi-host-{pod.role}", Problem(f"{pod.key}.hosts", f"{message}starts {starts}")


def _device_ids(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    limit = deployment.devices_per_host
    for instance in topology.instances:
        beyond = [d for d in instance.devices if d >= limit]
        if beyond:
            yield (
                "device-ids",
                Problem(
                    f"{instance.key}.devices",
                    f"expected ids below {limit} (profile {deployment.profile}), "
                    f"found {', '.join(map(str, beyond))}",
                ),
            )


def _devices_of_pod(pod: Pod) -> Iterator[Finding]:
    counts = {member.host: len(member.devices) for member in pod.members}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} on {host}" for host, count in counts.items())
        message = f"expected as many devices on each host, found {listed}"
        yield "equal-devices", Problem(f"{pod.key}.devices", message)


def _keys(key: str, given: Settings | ProxyEntry) -> Iterator[Finding]:
    """Find API keys: what is in the file is in every plan, start script and report, too."""
    for place, names in (("environment", given.environment), ("arguments", given.arguments)):
        for name in names:
            if name.upper().replace("-", "_").endswith("API_KEY"):
                message = (
                    "expected the key in a file on the hosts (`container.environment_file`), and "
                    "`api_key` to say where pd-deploy takes it from; found it here"
                )
                yield "no-key-in-file", Problem(f"{key}.{place}.{name}", message)


def _overrides(deployment: Deployment, pod: Pod) -> Iterator[Finding]:
    settings, engine = pod.master.settings, engines.get(deployment.engine)
    yield from _derived_environment(pod.key, settings.environment, engine.DERIVED_ENVIRONMENT)
    yield from _derived_arguments(pod.key, settings.arguments, engine.DERIVED_ARGUMENTS)
    for mount in (*deployment.container.mounts, *settings.mounts):
        if _is_ours(deployment, mount.target):
            message = f"expected another target, found {mount.target}, which pd-deploy mounts"
            yield "mount-targets", Problem(f"{pod.key}.mounts", message)


def _overrides_of_proxy(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    engine = engines.get(deployment.engine)
    for proxy in topology.proxies:
        key, entry = f"proxy.{proxy.name}", proxy.entry
        yield from _derived_environment(key, entry.environment, engine.DERIVED_PROXY_ENVIRONMENT)
        yield from _derived_arguments(key, entry.arguments, engine.DERIVED_PROXY_ARGUMENTS)
        yield from _keys(key, entry)


def _derived_environment(
    key: str, given: Iterable[str], derived: frozenset[str]
) -> Iterator[Finding]:
    for name in sorted(derived.intersection(given)):
        message = "expected no such key: its value follows from the topology"
        yield "derived-environment", Problem(f"{key}.environment.{name}", message)


def _derived_arguments(
    key: str, given: Iterable[str], derived: frozenset[str]
) -> Iterator[Finding]:
    for name in sorted(derived.intersection(name.replace("_", "-") for name in given)):
        message = "expected no such key: its value follows from other keys of the file"
        yield "derived-arguments", Problem(f"{key}.arguments.{name}", message)


def _is_ours(deployment: Deployment, target: str) -> bool:
    paths = deployment.paths
    code = deployment.code
    if not isinstance(code, str):
        code = engines.get(deployment.engine).code_place(deployment).path
    exact = {deployment.model.path, code, "/etc/localtime"}
    below = (f"{paths.state}/{deployment.name}/", f"{paths.logs}/{deployment.name}/")
    return target in exact or f"{target}/".startswith(below)


def _other_commits(deployment: Deployment, commits: Iterable[str]) -> Iterator[Finding]:
    """Find where source code is based on another commit than the image, as far as that is known:
    the rest of the image was built for its own."""
    tree = deployment.code_tree
    for commit in sorted(filter(None, commits)):
        if tree and tree.commit != commit:
            found = f"commit {tree.commit}" if tree.commit else "a tree without a commit"
            message = f"expected a tree of the image's commit {commit}, found {found}"
            yield "code-commit", Problem("code.source", message)


def _benchmark(deployment: Deployment, topology: Topology) -> Iterator[Finding]:
    benchmark = deployment.gates.benchmark
    if benchmark is None:
        return
    longest = engines.get(deployment.engine).longest_prompt(deployment, topology)
    needed = benchmark.input_length + benchmark.output_length
    if needed > longest:
        message = (
            f"expected input_length and output_length of at most {longest} tokens together, which "
            f"is the longest prompt with its answer that the service takes, found {needed}"
        )
        yield "benchmark-length", Problem("gates.benchmark", message)


def _unused(deployment: Deployment) -> Iterator[Finding]:
    """List the keys in the file or its profile that would change nothing."""
    for key in engines.get(deployment.engine).UNUSED_KEYS:
        for path in _given(deployment, key.split(".")):
            message = (
                f"expected no such key, because the engine {deployment.engine} does not use it"
            )
            yield "engine-keys", Problem(path, message)


def _given(part: object, key: list[str]) -> Iterator[str]:
    """List the paths at which a key is given; `*` stands for every entry of a mapping."""
    first, *rest = key
    if first == "*" and isinstance(part, dict):
        for name, entry in part.items():
            yield from (f"{name}.{path}" for path in _given(entry, rest))
    elif isinstance(part, BaseModel) and first in part.model_fields_set:
        below = _given(getattr(part, first), rest) if rest else [""]
        yield from (f"{first}.{path}".rstrip(".") for path in below)


def hint(problems: list[Problem]) -> str | None:
    """Say how to go on when a rule is broken on purpose."""
    if any("(rule " in problem.message for problem in problems):
        return "if a rule is broken on purpose, name it in the file: `allow: [RULE]`"
    return None
