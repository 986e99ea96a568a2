"""Reading an inventory: who runs where, on which devices and ports. Pure."""

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pd_deploy.config.fields import parse_devices
from pd_deploy.importer import expressions
from pd_deploy.importer.documents import Node, refused
from pd_deploy.importer.report import Place, Report, is_secret
from pd_deploy.importer.source import Answers, Role, Server, Source, SourceProxy

MAX_HOSTS = 256  # the largest of upstream's inventories has 27
_ROUNDS = 10  # a host's fields may refer to each other
_ROLES: dict[str, Role] = {"P": "prefill", "D": "decode"}
_OTHER_GROUPS = {
    "E": "encode servers of their own (EPD): pd-deploy runs prefill and decode only",
    "M": "a KV pool (mooncake): pd-deploy starts none",
}
_PORTS = {"node_port": "master_port", "api_port": "api_port", "zmq_port": "zmq_port"}
_OF_GROUP = {
    "global_port_base": "ports.master",
    "base_api_port": "ports.api",
    "base_zmq_port": "ports.zmq",
    "proxy_port": "proxy's port",
    "port_offset": "ports.decode_offset",
}
_OF_SERVICES = ("etcd_port", "mooncake_master_port", "mooncake_metrics_port")
_DERIVED_FIELDS = ("node_rank", "kv_rank", "host_ip", "role", "nnodes", "node_num")


@dataclass
class Entry:
    """A host of the inventory: Ansible's word for an instance. `values` are its fields, with
    their expressions evaluated as far as that is possible."""

    name: str
    group: str
    subgroup: str
    node: Node
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """Where it begins."""
        return self.node.place

    def line(self, key: str) -> Place:
        """Return where a field stands, or the entry if it has none."""
        node = self.node.mapping.get(key)
        return node.place if node else self.place

    def text(self, key: str) -> str | None:
        """Return a field as text; None if it is absent or unknown."""
        value = self.values.get(key)
        return None if value is None or isinstance(value, dict | list) else str(value)

    def number(self, key: str) -> int | None:
        """Return a field as a whole number; None if it is absent or none."""
        text = self.text(key)
        return int(text) if text is not None and re.fullmatch(r"\d{1,6}", text) else None


def entries(root: Node, report: Report, answers: Answers) -> list[Entry]:
    """List the entries of all groups, each with its values; report groups that are not read.

    Raises:
        InvalidInput: the file is no inventory.
    """
    children = root.at("all", "children")
    if children is None or not children.mapping:
        message = "expected an inventory with all.children, in which are the groups P, D and C"
        raise refused(root.place, message)
    shared = _variables(root.at("all", "vars"), {}, report)
    answers.used |= {name for name in answers.values if root.mentions(name)}
    shared |= answers.values  # as Ansible's `-e`: they take precedence
    listed = [
        entry
        for group, node in children.mapping.items()
        for entry in _of_group(group, node, shared, report)
    ]
    if len(listed) > MAX_HOSTS:
        message = f"expected at most {MAX_HOSTS} entries, found {len(listed)}"
        raise refused(children.place, message)
    return listed


def _of_group(group: str, node: Node, shared: Mapping[str, Any], report: Report) -> Iterator[Entry]:
    if group not in (*_ROLES, "C"):
        meaning = _OTHER_GROUPS.get(group, "a group that no playbook for prefill and decode has")
        if node.mapping:
            report.add("not expressible", node.place, f"group {group}", meaning)
        return
    names = {**shared, **_variables(node.at("vars"), shared, report)}
    yield from _hosts(group, "", node, names, report)
    subgroups = node.at("children")
    for subgroup, below in subgroups.mapping.items() if subgroups else ():
        inner = {**names, **_variables(below.at("vars"), names, report)}
        yield from _hosts(group, subgroup, below, inner, report)


def _hosts(
    group: str, subgroup: str, node: Node, names: Mapping[str, Any], report: Report
) -> Iterator[Entry]:
    hosts = node.at("hosts")
    for name, host in hosts.mapping.items() if hosts else ():
        entry = Entry(name, group, subgroup, host)
        entry.values = _evaluated(entry, names, report)
        yield entry


def _variables(node: Node | None, names: Mapping[str, Any], report: Report) -> dict[str, Any]:
    if node is None:
        return {}
    values: dict[str, Any] = {}
    for key, below in node.mapping.items():
        value = _resolved(below, {**names, **values}, f"{key}", report)
        values |= {} if value is None else {key: value}
        _report_variable(key, below, report)
    return values


def _report_variable(key: str, node: Node, report: Report) -> None:
    place = node.place
    if node.is_encrypted or is_secret(key, node.text) or key in _CREDENTIALS:
        report.add("secret", place, key, "name a block in `ssh.credentials`, or use your SSH agent")
    elif key in _OF_GROUP:
        report.add("derived", place, key, f"{_OF_GROUP[key]}, from the instances' own ports")
        for name, below in node.mapping.items():
            report.add("derived", below.place, f"{key}.{name}", _OF_GROUP[key])
    elif key in ("ansible_user", "ansible_port"):
        report.add("taken", place, key, f"ssh.{key.removeprefix('ansible_')}")
    elif key == "ansible_ssh_common_args":
        note = "host keys are verified, always; jump hosts and other options: ~/.ssh/config"
        report.add("implied", place, key, note)
    elif key in _OF_SERVICES:
        report.add("not expressible", place, key, "etcd and mooncake are not started")
    else:
        report.add("unmapped", place, key)


_CREDENTIALS = (
    "ansible_password",
    "ansible_ssh_pass",
    "ansible_ssh_private_key_file",
    "ansible_become_password",
    "passwd",
)


def _resolved(node: Node, names: Mapping[str, Any], what: str, report: Report) -> Any:
    """Return a value with its expressions evaluated; None, and a problem, where that can't be."""
    if node.mapping:
        return {key: _resolved(below, names, key, report) for key, below in node.mapping.items()}
    if not isinstance(node.value, str):
        return node.value if not isinstance(node.value, list) else None
    try:
        return expressions.evaluate(node.value, names)
    except expressions.Refused as error:
        report.add("problem", node.place, what, _advice(error))
        return None


def _advice(error: expressions.Refused) -> str:
    return f"expected a value or a sum of variables, found {error}; write the value itself"


def _evaluated(entry: Entry, names: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Evaluate an entry's fields, which may refer to each other, until nothing changes."""
    fields = {
        key: node
        for key, node in entry.node.mapping.items()
        if node.is_scalar and not node.is_encrypted and not is_secret(key, node.text)
    }
    values: dict[str, Any] = {}
    open_fields = dict(fields)
    refusals: dict[str, expressions.Refused] = {}
    for _ in range(_ROUNDS):
        refusals = {}
        for key, node in list(open_fields.items()):
            try:
                text = node.value
                scope = {**names, **values}
                values[key] = expressions.evaluate(text, scope) if isinstance(text, str) else text
                del open_fields[key]
            except expressions.Refused as error:
                refusals[key] = error
        if not refusals:
            break
    for key, refusal in refusals.items():
        report.add("problem", fields[key].place, f"{entry.name}.{key}", _advice(refusal))
    return {**names, **values}


def describe(listed: list[Entry], source: Source) -> None:
    """Enter the servers and proxies of an inventory's entries, pod by pod, into a source."""
    report = source.report
    for group, role in _ROLES.items():
        of_group = [entry for entry in listed if entry.group == group]
        if not of_group:
            report.add("problem", source.place, f"group {group}", "expected a host, found none")
        for pod in _pods(of_group, role, report):
            members = _ordered(pod, report)
            for index, entry in enumerate(members):
                server = _server(entry, role, members[0].name, index, report)
                if server:
                    source.servers.append(server)
    proxies = [entry for entry in listed if entry.group == "C"]
    if not proxies:
        report.add("problem", source.place, "group C", "expected a host for the proxy, found none")
    for entry in proxies:
        source.proxies.append(_proxy(entry, report))
    for entry in listed:
        _take_login(entry, source)


def _pods(listed: list[Entry], role: Role, report: Report) -> list[list[Entry]]:
    """Group entries: prefills by kv_rank, decodes by sub-group, both else by the master's address.
    Without any of these a prefill is a pod of its own, and all decodes are one."""
    pods: dict[object, list[Entry]] = {}
    for entry in listed:
        rank, master = entry.number("kv_rank"), entry.text("host_ip")
        if role == "prefill":
            key: object = rank if rank is not None else master or entry.subgroup or entry.name
        else:
            key = entry.subgroup or master or ""
        pods.setdefault(key, []).append(entry)
    for members in pods.values():
        masters = {entry.text("host_ip") for entry in members}
        if role == "prefill" and len(masters) > 1:
            names = ", ".join(entry.name for entry in members)
            message = "expected one host_ip per kv_rank; give each pod a kv_rank of its own"
            report.add("problem", members[1].line("kv_rank"), f"kv_rank of {names}", message)
    ranks = [members[0].number("kv_rank") for members in pods.values()]
    if role == "prefill" and all(rank is not None for rank in ranks):
        return sorted(pods.values(), key=lambda members: members[0].number("kv_rank") or 0)
    return list(pods.values())


def _ordered(members: list[Entry], report: Report) -> list[Entry]:
    """Put the master first, the others by their node_rank."""
    masters = [m for m in members if m.text("host_ip") in (None, m.text("ansible_host"))]
    if not masters:
        entry = members[0]
        report.add(
            "changed",
            entry.line("host_ip"),
            f"{entry.name}.host_ip {entry.text('host_ip')}",
            f"no instance of its pod has it as ansible_host; {entry.text('ansible_host')} is taken "
            "as the master (the playbook leaves such a pod out of the proxy's list)",
        )
    first = (masters or members)[0]
    others = [member for member in members if member is not first]
    return [first, *sorted(others, key=lambda member: member.number("node_rank") or 0)]


def _server(entry: Entry, role: Role, pod: str, index: int, report: Report) -> Server | None:
    address, devices = _address(entry, report), _devices(entry, report)
    for key in _DERIVED_FIELDS:
        if key in entry.node.mapping:
            note = "from the order of the pods and of each pod's hosts"
            report.add("derived", entry.line(key), f"{entry.name}.{key}", note)
    for key in entry.node.mapping:
        if key not in (*_DERIVED_FIELDS, *_PORTS, *_READ):
            _report_field(entry, key, report)
    if address is None or devices is None:
        return None
    server = Server(entry.name, role, address, pod, devices, entry.place, node_rank=index)
    server.kv_rank = entry.number("kv_rank") if role == "prefill" else None
    for key, attribute in _PORTS.items():
        if key in entry.node.mapping and (port := _port(entry, key, report)) is not None:
            setattr(server, attribute, port)
            report.add("taken", entry.line(key), f"{entry.name}.{key} {port}", "ports")
    return server


_READ = ("ansible_host", "ascend_rt_visible_devices", "npu_server_list", "ansible_user",
         "ansible_port")  # fmt: skip


def _report_field(entry: Entry, key: str, report: Report) -> None:
    node = entry.node.mapping[key]
    if node.is_encrypted or key in _CREDENTIALS or is_secret(key, node.text):
        note = "name a block in `ssh.credentials`, or use your SSH agent"
        report.add("secret", node.place, f"{entry.name}.{key}", note)
    elif key == "ansible_ssh_common_args":
        report.add("implied", node.place, f"{entry.name}.{key}", "host keys are verified, always")
    elif key not in ("DOCKER_IMAGE_ID", "env", "args", "master_node", "container_name"):
        report.add("unmapped", node.place, f"{entry.name}.{key}")


def _address(entry: Entry, report: Report) -> str | None:
    text, place = entry.text("ansible_host"), entry.line("ansible_host")
    what = f"{entry.name}.ansible_host {text or ''}".strip()
    try:
        address = ipaddress.IPv4Address(text or "")
    except ValueError:
        message = "expected an IPv4 address, at which the other hosts reach this one"
        report.add("problem", place, what, message)
        return None
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        message = "expected the address at which the other hosts reach this one; enter your hosts'"
        report.add("problem", place, what, message)
        return None
    report.add("taken", place, what, "hosts")
    return str(address)


def _devices(entry: Entry, report: Report) -> tuple[int, ...] | None:
    key = next((k for k in _READ[1:3] if k in entry.node.mapping), _READ[1])
    place, what = entry.line(key), f"{entry.name}.{key}"
    value = entry.values.get(key)
    try:
        devices = parse_devices(str(value).strip("[] ") if value is not None else None)
    except ValueError as error:
        report.add("problem", place, what, str(error))
        return None
    report.add("taken", place, what, "devices")
    return devices


def _port(entry: Entry, key: str, report: Report) -> int | None:
    port = entry.number(key)
    if port is not None and 1 <= port <= 65535:
        return port
    if key in entry.values:
        what = f"{entry.name}.{key} {entry.text(key)}"
        report.add("problem", entry.line(key), what, "expected a port, 1 to 65535")
    return None


def _proxy(entry: Entry, report: Report) -> SourceProxy:
    proxy = SourceProxy(entry.name, _address(entry, report) or "", entry.place)
    if "node_port" in entry.node.mapping:
        proxy.port = _port(entry, "node_port", report)
        report.add("taken", entry.line("node_port"), f"{entry.name}.node_port {proxy.port}", "port")
    for key in entry.node.mapping:
        if key in _DERIVED_FIELDS:
            report.add("derived", entry.line(key), f"{entry.name}.{key}", "the proxy's place")
        elif key not in (*_READ, "node_port"):
            _report_field(entry, key, report)
    return proxy


def _take_login(entry: Entry, source: Source) -> None:
    user, port = entry.text("ansible_user"), entry.number("ansible_port")
    login = {"user": user, "port": port}
    source.logins[str(entry.text("ansible_host"))] = {k: v for k, v in login.items() if v}
    for key in ("ansible_user", "ansible_port"):
        if key in entry.node.mapping:
            source.report.add("taken", entry.line(key), f"{entry.name}.{key}", "ssh")
