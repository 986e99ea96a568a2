"""Reading a playbook of roles, as they are since July 2026: settings in profiles. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from pd_deploy.config.models import ContainerOptions
from pd_deploy.importer import launcher, playbook, scripts, shell
from pd_deploy.importer.documents import Node
from pd_deploy.importer.inventory import Entry
from pd_deploy.importer.playbook import Options, Reader
from pd_deploy.importer.report import Kind, Report
from pd_deploy.importer.scripts import Follower
from pd_deploy.importer.shell import Shell
from pd_deploy.importer.source import Answers, Argument, Role, Server, Source, is_placeholder

_RUNNER = "pd_run_pangu_ultra_moe.sh"  # the role's default
_KV_PORT = 5568  # that of the launcher's script
# What the role itself gives a launcher, all of it from the topology.
_GIVEN = {
    "--base-api-port", "--log-dir", "--master-ip", "--master-port", "--num-dp", "--num-servers",
    "--server-offset", "--use-inventory-devices", "ASCEND_RT_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME", "OMNI_PD_DECODE_POD_NUM", "OMNI_PD_PREFILL_POD_NUM", "OMNI_PD_ROLE",
    "TP_SOCKET_IFNAME", "VLLM_LLMDATADIST_ZMQ_PORT",
}  # fmt: skip
_CONNECTOR = "LLMDataDistConnector"  # likewise
_PROFILES: dict[Role, str] = {
    "prefill": "run_server_prefill_profile",
    "decode": "run_server_decode_profile",
}
_IMPLIED = {
    "container_workspace": "the code in the image",
    "sync_code_profile": "`code`; see docs/from-ansible.md",
    "fetch_log_profile": "`pd-deploy logs`",
}
_NOT_DONE = {
    "pip_install_profile": "no code is installed in containers",
    "proc_bind_profile": "processes are not bound to CPUs",
    "mooncake_profile": "neither mooncake nor etcd is started",
    "kv_offload": "KV is not offloaded to the host's memory",
    "kv_pool": "no KV pool is started",
    "enable_kv_pool": "no KV pool is started",
}
_OF_SERVERS = ("runner", "workdir", "docker_envs", "prepare_commands", "args",
               "multi_node_backend", "kv_role", "kv_connector")  # fmt: skip


def is_of_roles(play: Node) -> bool:
    """Tell whether a play has its settings in profiles of the roles."""
    return any(play.at("vars", name) is not None for name in _PROFILES.values())


def read(listed: list[Entry], play: Node, source: Source, answers: Answers) -> None:
    """Enter what a playbook gives the inventory's servers and proxies into a source."""
    environment = playbook.environment_of(play, source, answers)
    node = play.at("vars")
    nodes = node.mapping if node else {}
    texts = {
        "container_workspace": "/workspace",
        **playbook.texts_of(nodes, environment, answers, source.report),
    }
    source.contract = "v1" if "tools/scripts" in _workdirs(nodes) else "roles"
    reader = Reader(listed, source, environment, texts)
    container = _read_container(nodes.get("run_docker_profile"), environment, source)
    for role, key in _PROFILES.items():
        profile = nodes.get(key)
        for server in source.of(role):
            _read_server(profile, nodes, server, reader, environment, container, source)
    _read_proxy(nodes.get("run_proxy_profile"), reader, environment, source)
    _report_others(nodes, source.report)


def _workdirs(nodes: Mapping[str, Node]) -> str:
    profiles = (nodes.get(name) for name in _PROFILES.values())
    workdirs = (profile.at("workdir") for profile in profiles if profile)
    return " ".join(workdir.text for workdir in workdirs if workdir)


def _report_others(nodes: Mapping[str, Node], report: Report) -> None:
    known = (*_PROFILES.values(), "run_docker_profile", "run_proxy_profile", "model", "model_path")
    for name, node in nodes.items():
        if name in _IMPLIED:
            report.add("implied", node.place, name, _IMPLIED[name])
        elif name in _NOT_DONE:
            report.add("not expressible", node.place, name, _NOT_DONE[name])
        elif name == "run_server_common_profile":
            for key, below in node.mapping.items():
                note = "pd-deploy starts what depends on it when it is up"
                report.add("derived", below.place, f"{name}.{key} {below.text}", note)
        elif name not in known:
            report.add("unmapped", node.place, name)


def _read_container(
    profile: Node | None, environment: Mapping[str, str | None], source: Source
) -> dict[str, str]:
    """Enter the containers' options, as options of `docker run`; return their variables. What is
    given comes on top of the role's own mounts, which are the defaults here."""
    if profile is None:
        return {}
    options = Options(source, environment)
    names = {"envs": "-e", "extra_mounts": "-v", "shm_size": "--shm-size"}
    words = [
        Argument(word, item.place)
        for key, option in names.items()
        if (node := profile.at(key)) is not None
        for item in (node.items or [node])
        if item.text
        for word in (option, item.text)
    ]
    options.read(words)
    del source.container["devices"]  # not given here
    default = [entry.source for entry in ContainerOptions().mounts]
    source.container["mounts"] = [*default, *source.container["mounts"]]
    for key, node in profile.mapping.items():
        if key not in names:
            source.report.add("unmapped", node.place, f"run_docker_profile.{key}")
    return options.environment


def _read_server(
    profile: Node | None,
    nodes: Mapping[str, Node],
    server: Server,
    reader: Reader,
    variables: Mapping[str, str | None],
    container: Mapping[str, str],
    source: Source,
) -> None:
    report = source.report
    for name, (key, attribute) in {
        "model": ("model", "served_name"),
        "model_path": ("model_path", "model_path"),
    }.items():
        value = str(reader.names(server.name).get(key) or "").rstrip("/")
        node = nodes.get(name)
        if is_placeholder(value):
            message = f"expected a value, found a placeholder; give --set {name}=…"
            report.add("problem", node.place if node else source.place, name, message)
        elif value:
            setattr(server, attribute, value)
            report.add("taken", node.place if node else source.place, f"{name} {value}", "model")
    if profile is None:
        return
    given = {"OMNI_PD_PREFILL_POD_NUM": str(len(source.pods("prefill"))), **reader.given(server)}
    server.derived |= set(given)
    begin = {**variables, **container, **given, **_docker_envs(profile, server, report)}
    for name, value in container.items():
        launcher.take_environment(name, value, server, profile.place, report)
    run = scripts.reader_of(server, report, source.interfaces)
    follower = Follower(report, reader.names(server.name), reader.budget, run)
    prepare = profile.at("prepare_commands")
    state = Shell(begin, budget=reader.budget)
    if prepare is not None:
        report.add("taken", prepare.place, "prepare_commands", f"settings.{server.role}")
        state = follower.follow(scripts.parse(prepare), begin)
    words = list(_arguments(profile, state, reader.names(server.name)))
    runner = profile.at("runner")
    program = runner.text.rpartition("/")[2] if runner else _RUNNER
    launcher.read(words, program, server, profile.place, report)
    if server.role == "prefill" and server.tensor_parallel is None:
        members = [other for other in source.of("prefill") if other.pod == server.pod]
        server.tensor_parallel = sum(len(member.devices) for member in members)
    server.derived |= _GIVEN
    server.kv.setdefault("kv_connector", _connector(profile, nodes))
    server.kv.setdefault("kv_port", server.zmq_port or _KV_PORT)
    _report_profile(profile, server, report)


def _docker_envs(profile: Node, server: Server, report: Report) -> dict[str, str]:
    node, result = profile.at("docker_envs"), {}
    for name, below in node.mapping.items() if node else ():
        launcher.take_environment(name, below.text, server, below.place, report)
        result[name] = below.text
    return result


def _arguments(profile: Node, state: Shell, names: Mapping[str, Any]) -> Iterator[Argument]:
    """Expand the fragments of `args`, each with the line where it begins."""
    node = profile.at("args")
    for item in node.items if node else ():
        script = scripts.parse(item)
        local = Shell(state.variables, budget=state.budget, templates=script.values(names))
        for statement in script.statements:
            words = local.words(statement) if isinstance(statement, shell.Command) else []
            for text, line in words:
                yield Argument(text, script.line(line))


def _connector(profile: Node, nodes: Mapping[str, Node]) -> str:
    common = nodes.get("run_server_common_profile")
    for node in (profile, common):
        if node is not None and (connector := node.at("kv_connector")) is not None:
            return connector.text
    return _CONNECTOR


def _report_profile(profile: Node, server: Server, report: Report) -> None:
    for key, node in profile.mapping.items():
        what = f"{_PROFILES[server.role]}.{key}"
        if key in _NOT_DONE:
            enabled = node.at("enable") or node
            is_off = enabled.value in (False, None)
            kind: Kind = "implied" if is_off else "not expressible"
            report.add(kind, node.place, what, "switched off" if is_off else _NOT_DONE[key])
        elif key == "multi_node_backend" and node.text not in ("ray", ""):
            note = "ray brings up a prefill over hosts"
            report.add("not expressible", node.place, f"{what} {node.text}", note)
        elif key in _OF_SERVERS:
            report.add("derived", node.place, what)
        else:
            report.add("unmapped", node.place, what)


def _read_proxy(
    profile: Node | None,
    reader: Reader,
    environment: Mapping[str, str | None],
    source: Source,
) -> None:
    for proxy in source.proxies:
        proxy.program = "omni"
        if profile is None:
            continue
        kind = profile.at("type")
        proxy.program = "global" if kind is not None and kind.text == "global-proxy" else "omni"
        run = playbook.proxy_reader(proxy, source.report)
        follower = Follower(source.report, reader.names(proxy.name), reader.budget, run)
        prepare = profile.at("prepare_commands")
        state = Shell(dict(environment), budget=reader.budget)
        if prepare is not None:
            state = follower.follow(scripts.parse(prepare), environment)
        own = profile.at(f"{proxy.program}-proxy") or profile
        names = reader.names(proxy.name)
        words = list(_arguments(own, state, names))
        playbook.read_proxy_flags(words, proxy, source.report)
        for key, node in profile.mapping.items():
            is_other = key.endswith("-proxy") and key != f"{proxy.program}-proxy"
            note = "not the type that is chosen" if is_other else ""
            source.report.add("implied", node.place, f"run_proxy_profile.{key}", note)
