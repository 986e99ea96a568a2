"""Making the deployment file that says what imported files say. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import yaml

from pd_deploy.config.load import parse_deployment
from pd_deploy.config.models import ContainerOptions, Deployment, Paths, ProxyEntry
from pd_deploy.engines.omniinfer.contracts import CONTRACTS
from pd_deploy.errors import InvalidInput
from pd_deploy.importer import ports, profile_choice
from pd_deploy.importer.profile_choice import Choice
from pd_deploy.importer.source import Role, Server, Source, SourceProxy, as_scalar
from pd_deploy.planning import placement, rules

ENGINE = "omniinfer"
_FIXED_BY_FILE = 10  # rounds: a fix may show another broken rule


@dataclass(frozen=True)
class Draft:
    """A deployment file.

    Attributes:
        document: what it says.
        deployment: the same, on its profile.
        names: of each server of the source, that of the instance.
        reasons: why settings are others than the source's, by the end of their path.
    """

    document: Mapping[str, Any]
    deployment: Deployment
    choice: Choice
    names: Mapping[str, str]
    reasons: Mapping[str, str]


class Writer:
    """Makes a draft of a source; rules that it breaks are met, or allowed with `compat`."""

    def __init__(
        self, source: Source, name: str, *, profile: str | None = None, compat: bool = False
    ) -> None:
        self._source, self._name, self._compat = source, name, compat
        self._profile = profile
        self._allow: list[str] = []
        self._reasons: dict[str, str] = {}
        self._pod_ports: dict[str, dict[str, Any]] = {}
        self._hosts = _letters(
            dict.fromkeys(
                [server.address for server in source.servers]
                + [proxy.address for proxy in source.proxies]
            )
        )

    def draft(self) -> Draft | None:
        """Return a draft that `pd-deploy check` accepts; None, and problems in the report, where
        there is none."""
        for _ in range(_FIXED_BY_FILE):
            document, choice = self._document()
            try:
                deployment = parse_deployment(document)
            except InvalidInput as error:
                self._refuse(f"{problem.key}: {problem.message}" for problem in error.problems)
                return None
            if self._place_ports(deployment):
                continue
            problems = rules.broken(deployment, placement.derive(deployment))
            unmet = [p for p in problems if not self._meet(p.key, p.message, deployment)]
            if unmet:
                self._refuse(f"{problem.key}: {problem.message}" for problem in unmet)
                return None
            if not problems:
                names = self._names(deployment)
                return Draft(document, deployment, choice, names, self._reasons)
        self._refuse(["the rules of a deployment file contradict each other here"])
        return None

    def _refuse(self, messages: Iterable[str]) -> None:
        for message in messages:
            self._source.report.add("problem", self._source.place, "deployment file", message)

    def _meet(self, key: str, message: str, deployment: Deployment) -> bool:
        """Change the source so that it keeps a rule, or allow it; tell whether that is possible."""
        match = re.search(r"\(rule ([a-z-]+)\)$", message)
        rule = match[1] if match else ""
        fix = _FIXES.get(rule)
        if fix is None:
            return False
        if self._compat and rule != "contract-of-image":
            self._allow.append(rule)
            return True
        pod = key.split(".")[1] if "." in key else ""
        name, reason = fix(self, deployment, [s for s in self._source.servers if _pod(s) == pod])
        self._reasons[name] = f"{reason} (rule {rule})"
        return True

    def _place_ports(self, deployment: Deployment) -> bool:
        """Give pods ports of their own where the formula makes others; tell whether any needs."""
        topology, names = placement.derive(deployment), self._names(deployment)
        instances = {i.name: i for i in topology.instances}
        members = {server.name: instances[names[server.name]] for server in self._source.servers}
        differing = [
            (server, kind)
            for server, kind in ports.differing(self._source, members)
            if kind != "master" or members[server.name].is_master
        ]
        for server, kind in differing:
            pod = [s for s in self._source.servers if s.pod == server.pod and s.role == server.role]
            own = {self._hosts[s.address]: ports.of(s, kind, members[s.name]) for s in pod}
            only = len(pod) == 1 or kind == "master"
            port = own[self._hosts[pod[0].address]] if only else own
            self._pod_ports.setdefault(_pod(server), {})[kind] = port
        return bool(differing)

    def _batched_tokens(self, deployment: Deployment, servers: list[Server]) -> tuple[str, str]:
        model = deployment.model
        for server in servers:
            prefill = server.role == "prefill"
            longest = model.max_len_prefill if prefill else model.max_len_decode
            server.arguments["max-num-batched-tokens"] = longest
        return "max-num-batched-tokens", "a longer prompt would block all behind it"

    def _gear_list(self, deployment: Deployment, servers: list[Server]) -> tuple[str, str]:
        for server in servers:
            config = dict(server.additional_config or {})
            gears = config.pop("decode_gear_list", None)
            graph = dict(config.get("graph_model_compile_config") or {})
            if gears is not None:
                config["graph_model_compile_config"] = {**graph, "decode_gear_list": gears}
            server.additional_config = config
        return "decode_gear_list", "it is read only inside graph_model_compile_config"

    def _contract(self, deployment: Deployment, servers: list[Server]) -> tuple[str, str]:
        self._source.contract = None
        return "contract", "the image's tag tells another age than the files"

    def _document(self) -> tuple[dict[str, Any], Choice]:
        source = self._source
        pods = {_pod(pod[0]): pod[0] for r in ROLES for pod in source.pods(r)}
        choice = profile_choice.choose(pods, ENGINE, self._profile, compat=self._compat)
        document: dict[str, Any] = {"name": self._name, "engine": ENGINE}
        document |= {"profile": choice.profile}
        if extra := self._kv_extra():
            document["kv_connector_extra_config"] = extra
        if self._compat and "upstream" in choice.document:
            document["compat"] = "upstream"
        document |= self._devices_per_host(choice)
        document |= {"image": source.image, "model": self._model()}
        document |= self._contract_key()
        document |= {"allow": list(dict.fromkeys(self._allow))} if self._allow else {}
        document |= self._supports(choice)
        document |= _some("ssh", self._login())
        document["hosts"] = {letter: self._host(address) for address, letter in self._hosts.items()}
        for role in ROLES:
            document[role] = {_pod(pod[0]): self._pod(pod, choice) for pod in source.pods(role)}
        document["proxy"] = {proxy.name: self._proxy(proxy) for proxy in source.proxies}
        levels = {
            level: _written(choice.levels[level])
            for level in ("all", *ROLES)
            if choice.levels[level]
        }
        document |= _some("settings", levels)
        document |= _some("ports", ports.solve(source))
        document |= {"code": source.code} if source.code else {}
        document |= {"http_proxy": source.http_proxy} if source.http_proxy else {}
        if source.logs and source.logs.rstrip("/") != Paths().logs:
            document["paths"] = {"logs": source.logs.rstrip("/")}
        document |= _some("container", self._container())
        return document, choice

    def _devices_per_host(self, choice: Choice) -> dict[str, Any]:
        highest = max(device for server in self._source.servers for device in server.devices)
        needed = 8 if highest < 8 and "a2" in self._source.hints else 16
        return {} if choice.document.get("devices_per_host") == needed else _per_host(needed)

    def _contract_key(self) -> dict[str, Any]:
        return {"contract": self._source.contract} if self._source.contract else {}

    def _kv_extra(self) -> dict[str, Any]:
        """Return what all servers' KV connectors are given besides."""
        extras = [s.kv.get("kv_connector_extra_config") for s in self._source.servers]
        same = extras[0] and all(extra == extras[0] for extra in extras)
        return dict(extras[0]) if same and isinstance(extras[0], dict) else {}

    def _model(self) -> dict[str, Any]:
        source = self._source
        first = {role: source.of(role)[0] for role in ROLES}
        return {
            "path": first["prefill"].model_path,
            "served_name": first["prefill"].served_name,
            "max_len_prefill": first["prefill"].max_len,
            "max_len_decode": first["decode"].max_len,
        }

    def _supports(self, choice: Choice) -> dict[str, Any]:
        source, needed = self._source, dict[str, Any]()
        has = choice.document.get("supports") or {}
        if any(len(pod) > 1 for pod in source.pods("prefill")):
            needed["multi_host_prefill"] = "ray"
        if any(len(pod) > 1 for pod in source.pods("decode")):
            needed["multi_host_decode"] = True
            if counts := _offset_counts(source.pods("decode")):
                needed["server_offset"] = counts
        sizes = {_tensor_parallel(pod) for role in ROLES for pod in source.pods(role)}
        if len(sizes) > 1:
            needed["tensor_parallel"] = "divisible"
        return _some("supports", {k: v for k, v in needed.items() if has.get(k) != v})

    def _host(self, address: str) -> object:
        interface = self._source.interfaces.get(address)
        login = self._source.logins.get(address, {})
        entry: dict[str, Any] = {"address": address}
        entry |= {"interface": interface} if interface else {}
        entry |= {"ssh": login} if login != self._login() else {}
        return entry if len(entry) > 1 else address

    def _login(self) -> dict[str, Any]:
        """Return how the first host is logged in at; the others may differ."""
        return self._source.logins.get(next(iter(self._hosts)), {})

    def _pod(self, pod: list[Server], choice: Choice) -> dict[str, Any]:
        hosts = [self._hosts[server.address] for server in pod]
        entry: dict[str, Any] = {"host": hosts[0]} if len(pod) == 1 else {"hosts": hosts}
        devices = [_ranges(server.devices) for server in pod]
        same = len(set(devices)) == 1
        entry["devices"] = devices[0] if same else dict(zip(hosts, devices, strict=True))
        entry |= _some("ports", self._pod_ports.get(_pod(pod[0])))
        return entry | _written(choice.levels[_pod(pod[0])])

    def _proxy(self, proxy: SourceProxy) -> dict[str, Any]:
        entry: dict[str, Any] = {"host": self._hosts[proxy.address]}
        for key in ("port", "log_level", "core_num", "start_core_index", "prefill_lb_sdk",
                    "decode_lb_sdk"):  # fmt: skip
            value = getattr(proxy, key)
            if value is not None and value != ProxyEntry.model_fields[key].default:
                entry[key] = value
        if proxy.program != _default_program(self._source):
            entry["program"] = proxy.program
        entry |= _some("environment", proxy.environment) | _some("arguments", proxy.arguments)
        return entry

    def _container(self) -> dict[str, Any]:
        source, default = self._source, ContainerOptions()
        given = dict(source.container)
        try:
            parsed = ContainerOptions.model_validate(given | {"names": source.container_names})
        except ValueError:
            return given | _some("names", source.container_names)
        result = {
            key: given[key]
            for key in given
            if _comparable(getattr(parsed, key)) != _comparable(getattr(default, key))
        }
        if parsed.names != default.names:
            result["names"] = dict(source.container_names)
        return result

    def _names(self, deployment: Deployment) -> dict[str, str]:
        """Return the names that instances have in the deployment, by those of the source."""
        instances = placement.derive(deployment).instances
        names = {(i.role, i.pod, i.address): i.name for i in instances}
        return {
            server.name: names[server.role, _pod(server), server.address]
            for server in self._source.servers
        }


ROLES: tuple[Role, ...] = ("prefill", "decode")
_FIXES = {
    "batched-tokens": Writer._batched_tokens,
    "decode-gear-list": Writer._gear_list,
    "contract-of-image": Writer._contract,
}


def text_of(draft: Draft, comments: Iterable[str]) -> str:
    """Write a draft as YAML, below some comments."""
    head = "".join(f"# {line}\n" for line in comments)
    root = dict(draft.document)
    return head + yaml.dump(root, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes mappings without further ones in one line, as the examples have them."""

    _root: object = None

    def represent(self, data: Any) -> None:
        """Represent a document; see the class."""
        self._root = data
        super().represent(data)

    def ignore_aliases(self, data: object) -> bool:
        """Write a value again where it occurs again."""
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        """Represent a mapping; see the class."""
        is_small = isinstance(mapping, dict) and len(mapping) <= 4
        is_flat = is_small and not any(isinstance(v, dict | list) for v in mapping.values())
        is_flat = is_flat and mapping is not self._root
        return super().represent_mapping(tag, mapping, flow_style=is_flat)


def _pod(server: Server) -> str:
    """Return the name of a server's pod in the deployment file."""
    return re.sub(r"[^a-z0-9-]+", "-", server.pod.lower()).strip("-")[:40] or server.role


def _letters(addresses: Iterable[str]) -> dict[str, str]:
    return {
        address: ascii_lowercase[index] if index < 26 else f"h{index}"
        for index, address in enumerate(addresses)
    }


def _default_program(source: Source) -> str:
    """Return the proxy's program that the contract has unless the file says otherwise."""
    return next(iter(CONTRACTS[source.contract or "v0"].proxies))


def _some(key: str, value: Any) -> dict[str, Any]:
    return {key: value} if value else {}


def _per_host(number: int) -> dict[str, Any]:
    return {"devices_per_host": number}


def _written(settings: profile_choice.Settings) -> dict[str, Any]:
    """Return settings as the file has them: numbers as numbers, as far as they stay the same."""
    return profile_choice.nested(
        {
            path: as_scalar(value) if path[0] == "environment" and isinstance(value, str) else value
            for path, value in sorted(settings.items(), key=lambda item: _ORDER.index(item[0][0]))
        }
    )


_ORDER = ("gpu_memory_utilization", "tensor_parallel", "environment", "arguments",
          "additional_config")  # fmt: skip


def _ranges(devices: tuple[int, ...]) -> str:
    """Write devices as `0-7` where they are consecutive."""
    first, last = devices[0], devices[-1]
    if len(devices) > 1 and devices == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, devices))


def _tensor_parallel(pod: list[Server]) -> int:
    first = pod[0]
    if first.role == "prefill":
        return sum(len(server.devices) for server in pod)
    return first.tensor_parallel or len(first.devices)


def _offset_counts(pods: list[list[Server]]) -> str | None:
    """Tell what literal server offsets count: servers or devices; None where that can't be told."""
    for pod in pods:
        if len(pod) < 2 or not (offset := pod[1].literal.get("server-offset")):
            continue
        tp, devices = _tensor_parallel(pod), len(pod[0].devices)
        if tp > 1 and int(offset) in (devices, devices // tp):
            return "devices" if int(offset) == devices else "servers"
    return None


def _comparable(value: Any) -> Any:
    return frozenset(map(str, value)) if isinstance(value, tuple) else value
