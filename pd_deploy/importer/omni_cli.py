"""Reading a profile of omni_cli: one YAML file with each instance's variables and flags. Pure."""

import json
import re
from typing import Any

from pd_deploy.importer import launcher, playbook, shell
from pd_deploy.importer.documents import Node
from pd_deploy.importer.inventory import Entry
from pd_deploy.importer.report import Report, is_secret
from pd_deploy.importer.shell import Budget, Shell
from pd_deploy.importer.source import (
    Answers,
    Argument,
    Server,
    Source,
    SourceProxy,
    is_placeholder,
)

_IMAGE = "DOCKER_IMAGE_ID"
_PORT_VARIABLES = {
    "MASTER_PORT": "master_port",
    "API_PORT": "api_port",
    "VLLM_LLMDATADIST_ZMQ_PORT": "zmq_port",
    "OMNI_LLMDATADIST_ZMQ_PORT": "zmq_port",
}


def is_profile(root: Node) -> bool:
    """Tell whether a document is an omni_cli profile: entries with flags of their own."""
    groups = root.at("all", "children")
    hosts = (group.at("hosts") for group in groups.mapping.values()) if groups else ()
    return any(host.at("args") for node in hosts if node for host in node.mapping.values())


def read(listed: list[Entry], source: Source, answers: Answers) -> None:
    """Enter what the entries give their servers and proxies into a source."""
    budget = Budget()
    by_name = {entry.name: entry for entry in listed}
    source.image = answers.get("IMAGE", _IMAGE)
    for entry in listed:
        _take_image(entry, source)
        _take_container(entry, source.report)
    for server in source.servers:
        _read_server(by_name[server.name], server, source, answers, budget)
    for proxy in source.proxies:
        _read_proxy(by_name[proxy.name], proxy, source, budget)
    if source.image is None:
        message = "expected an image with a tag, found none; give --set IMAGE=NAME:TAG"
        source.report.add("problem", source.place, _IMAGE, message)
    _take_logs(source)


def group_pods(listed: list[Entry]) -> None:
    """Let entries with one `master_node` be a pod: give them its address as host_ip."""
    addresses = {entry.name: entry.values.get("ansible_host") for entry in listed}
    ranks: dict[str, int] = {}
    for entry in listed:
        master = str(entry.values.get("master_node") or entry.name)
        entry.subgroup = entry.subgroup or master
        entry.values["host_ip"] = addresses.get(master, entry.values.get("host_ip"))
        if entry.group == "P":
            entry.values["kv_rank"] = ranks.setdefault(master, len(ranks))


def _take_image(entry: Entry, source: Source) -> None:
    node = entry.node.at(_IMAGE)
    if node is None:
        return
    what = f"{entry.name}.{_IMAGE}={node.text}"
    if is_placeholder(node.text):
        source.report.add("default", node.place, what, "a placeholder: see --set IMAGE")
    elif source.image is None or source.image == node.text:
        source.image = node.text
        source.report.add("taken", node.place, what, "image")
    else:
        note = f"{source.image}: a service has one image"
        source.report.add("changed", node.place, what, note)


def _take_container(entry: Entry, report: Report) -> None:
    for key in ("container_name", "master_node"):
        if node := entry.node.at(key):
            note = "from container.names" if key == "container_name" else "the pod's `hosts`"
            report.add("derived", node.place, f"{entry.name}.{key}", note)


def _variables(entry: Entry, report: Report, budget: Budget) -> Shell:
    """Return the entry's variables, each of which may refer to others, until nothing changes."""
    node = entry.node.at("env")
    nodes = node.mapping if node else {}
    state = Shell({}, budget=budget)
    scripts = {
        name: shell.commands(f'{name}="{_escaped(below)}"')
        for name, below in nodes.items()
        if re.fullmatch(r"[A-Za-z_]\w*", name) and below.is_scalar and not _is_secret(name, below)
    }
    for _ in range(4):
        for statements in scripts.values():
            list(state.followed(statements))
    for name, below in nodes.items():
        if name not in scripts:
            report.add("secret" if _is_secret(name, below) else "unmapped", below.place, name)
    return state


def _is_secret(name: str, node: Node) -> bool:
    return node.is_encrypted or is_secret(name, node.text)


def _escaped(node: Node) -> str:
    text = "True" if node.value is True else "False" if node.value is False else node.text
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _read_server(
    entry: Entry, server: Server, source: Source, answers: Answers, budget: Budget
) -> None:
    state = _variables(entry, source.report, budget)
    for name in ("MODEL_PATH", "MODEL_LEN_MAX_PREFILL", "MODEL_LEN_MAX_DECODE"):
        if (answer := answers.get(name)) is not None:
            state.variables[name] = answer
    node = entry.node.at("env")
    for name, below in node.mapping.items() if node else ():
        value = state.variables.get(name)
        if name in _PORT_VARIABLES and value and value.isdecimal():
            setattr(server, _PORT_VARIABLES[name], int(value))
            source.report.add("taken", below.place, f"{entry.name}.{name}={value}", "ports")
        elif name in state.variables:
            interface = launcher.take_environment(name, value, server, below.place, source.report)
            if interface:
                source.interfaces[server.address] = interface
    arguments = entry.node.at("args")
    for name, below in arguments.mapping.items() if arguments else ():
        _read_argument(name, below, server, state, source.report)
    source.contract_why = source.contract_why or "omni_cli"
    server.literal["logs"] = state.variables.get("LOG_PATH") or ""


def _read_argument(name: str, node: Node, server: Server, state: Shell, report: Report) -> None:
    if name == "extra-args" and node.mapping:
        for key, below in node.mapping.items():
            value = _text(below, state)
            if value is None:
                note = "its value is known only where the script runs"
                report.add("not expressible", below.place, f"--{key}", note)
            else:
                launcher.take_argument(key, value or True, server, below.place, report)
                _report_all(key, below, f"arguments.{key}", report)
    elif name == "kv-transfer-config" and node.mapping:
        config = {key: _expanded(below, state) for key, below in node.mapping.items()}
        launcher.take_kv(_dropped(config), server, node.place, report)
        for key, below in node.mapping.items():
            report.add("derived", below.place, f"kv_transfer_config.{key}")
    elif name == "additional-config" and node.mapping:
        server.additional_config = _expanded(node, state)
        _report_all(name, node, "additional_config", report)
    else:
        launcher.read(_words(name, node, state), "", server, node.place, report)


def _words(name: str, node: Node, state: Shell) -> list[Argument]:
    words = [Argument(f"--{name}", node.place)]
    if node.text == "" and node.is_scalar:
        return words
    return [*words, Argument(_text(node, state), node.place)]


def _report_all(name: str, node: Node, where: str, report: Report) -> None:
    for key, below in node.mapping.items():
        report.add("taken", below.place, f"{name}.{key}", where)
        _report_all(f"{name}.{key}", below, where, report)


def _text(node: Node, state: Shell) -> str | None:
    """Return a value as a shell would pass it on; None where only running it would tell."""
    if not node.is_scalar:
        return json.dumps(_expanded(node, state), separators=(",", ":"))
    (command,) = shell.commands(f'x "{_escaped(node)}"') or (None,)
    if not isinstance(command, shell.Command) or len(command.words) != 2:
        return None
    return state.expand(command.words[1])


def _expanded(node: Node, state: Shell) -> Any:
    if node.mapping:
        return {key: _expanded(below, state) for key, below in node.mapping.items()}
    if node.items:
        return [_expanded(below, state) for below in node.items]
    if not isinstance(node.value, str) or "$" not in node.value:
        return node.value
    text = _text(node, state)
    return int(text) if text and re.fullmatch(r"\d{1,9}", text) else text


def _dropped(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a KV configuration what says where the ranktables are."""
    extra = config.get("kv_connector_extra_config")
    if isinstance(extra, dict):
        derived = ("global_rank_table_path", "local_rank_table_path", "prefill_pod_num",
                   "decode_pod_num")  # fmt: skip
        kept = {key: value for key, value in extra.items() if key not in derived}
        config = {k: v for k, v in config.items() if k != "kv_connector_extra_config"}
        config |= {"kv_connector_extra_config": kept} if kept else {}
    return config


def _read_proxy(entry: Entry, proxy: SourceProxy, source: Source, budget: Budget) -> None:
    state = _variables(entry, source.report, budget)
    port = state.variables.get("API_PORT") or state.variables.get("NODE_PORT")
    if port and port.isdecimal():
        proxy.port = int(port)
    node = entry.node.at("env")
    for name, below in node.mapping.items() if node else ():
        kind = "secret" if _is_secret(name, below) else "implied"
        source.report.add("secret" if kind == "secret" else "implied", below.place, name)
    arguments = entry.node.at("args")
    for name, below in arguments.mapping.items() if arguments else ():
        if name == "use_omni_proxy":
            proxy.program = "omni" if below.value in (True, 1, "1", "true") else "global"
            source.report.add("taken", below.place, f"{name} {below.text}", "proxy.program")
        else:
            playbook.read_proxy_flags(_words(name, below, state), proxy, source.report)


def _take_logs(source: Source) -> None:
    logs = [server.literal.pop("logs") for server in source.servers]
    if logs and logs[0]:
        name = source.servers[0].name
        source.logs = re.sub(rf"/+{re.escape(name)}/*$", "", logs[0]) or None
