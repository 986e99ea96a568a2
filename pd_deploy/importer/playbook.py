"""Reading a playbook that has its scripts in variables: those of summer 2025 to July 2026. Pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pd_deploy.importer import expressions, launcher, scripts, shell
from pd_deploy.importer.documents import Node, refused
from pd_deploy.importer.inventory import Entry
from pd_deploy.importer.report import Place, Report, is_secret
from pd_deploy.importer.scripts import Follower, Run, Script
from pd_deploy.importer.shell import Budget, Shell
from pd_deploy.importer.source import (
    Answers,
    Argument,
    Server,
    Source,
    SourceProxy,
    as_scalar,
    is_placeholder,
)

PREFILL, DECODE, PROXY = (
    "run_vllm_server_prefill_cmd",
    "run_vllm_server_decode_cmd",
    "run_proxy_cmd",
)
_NAMES = {"DOCKER_NAME_P": "prefill", "DOCKER_NAME_D": "decode", "DOCKER_NAME_C": "proxy"}
_ATTRIBUTES = {"DOCKER_IMAGE_ID": "image", "LOG_PATH": "logs", "HTTP_PROXY": "http_proxy"}
_USED = ("CODE_PATH", "KV_CONNECTOR", "USE_OMNI_PROXY")
_TAKEN = {
    "DOCKER_IMAGE_ID": "image",
    "LOG_PATH": "paths.logs",
    "HTTP_PROXY": "http_proxy",
    **{name: f"container.names.{role}" for name, role in _NAMES.items()},
    "MODEL_PATH": "model.path",
    "MODEL_LEN_MAX_PREFILL": "model.max_len_prefill",
    "MODEL_LEN_MAX_DECODE": "model.max_len_decode",
    "PREFILL_LB_SDK": "proxy.prefill_lb_sdk",
    "DECODE_LB_SDK": "proxy.decode_lb_sdk",
    "DECODE_TENSOR_PARALLEL_SIZE": "decode's tensor_parallel",
}
_DROPPED = {
    "SCRIPTS_PATH": "scripts lie below paths.state",
    "LOG_PATH_IN_EXECUTOR": "`pd-deploy logs` collects them",
    "RANKTABLE_SAVE_PATH": "ranktables lie below paths.state",
    "ranktable_save_path": "ranktables lie below paths.state",
}
_IMPLIED_SCRIPT = re.compile(
    r"generate_\w+|kill_\w+|docker_exec_cmd|start_docker_\w+|docker_(stop|rm|cp|ps)\w*|"
    r"sync_code\w*|pip_install\w*|\w*ranktable\w*|proc_bind\w*|stop_\w+|clean_\w+|\w*mooncake\w*"
)
_OF_PLAY = ("name", "hosts", "any_errors_fatal", "max_fail_percentage", "gather_facts", "become",
            "remote_user", "serial", "strategy")  # fmt: skip
_IMAGE_PLACES = ("IMAGE", "DOCKER_IMAGE_ID")


def is_playbook(root: Node) -> bool:
    """Tell whether a document is a list of plays."""
    return bool(root.items) and any(play.at("vars") or play.at("tasks") for play in root.items)


def play_of(root: Node, report: Report, answers: Answers) -> Node:
    """Return the first play, with what the others and the tasks become in the report.

    Raises:
        InvalidInput: there is none.
    """
    if not is_playbook(root):
        raise refused(root.place, "expected a playbook: a list of plays with vars; found none")
    answers.used |= {name for name in answers.values if root.mentions(name)}
    play, *others = root.items
    for other in others:
        report.add("unmapped", other.place, "a further play", "only the first is read")
    for key, node in play.mapping.items():
        if key in ("tasks", "pre_tasks", "post_tasks", "roles", "handlers"):
            note = "pd-deploy's own stages do this; see docs/from-ansible.md"
            report.add("implied", node.place, f"{key}: {len(node.items)} of them", note)
        elif key in _OF_PLAY:
            report.add("implied", node.place, key)
        elif key not in ("environment", "vars"):
            report.add("unmapped", node.place, key)
    return play


def environment_of(play: Node, source: Source, answers: Answers) -> dict[str, str | None]:
    """Read the play's `environment`, each value as text, with the answers in place of its own."""
    result: dict[str, str | None] = {}
    node = play.at("environment")
    for name, below in node.mapping.items() if node else ():
        value = _answered(name, below, answers, source.report)
        result[name] = value
        if value is not None:
            _take_variable(name, value, below.place, source)
    _take_image(node.at("DOCKER_IMAGE_ID") if node else None, play.place, source, answers)
    return result


def _take_image(node: Node | None, play: Place, source: Source, answers: Answers) -> None:
    """Take the image that is answered, or else the file's, unless that is a placeholder."""
    place, found = (node.place, node.text) if node else (play, "none")
    source.image = answers.get(*_IMAGE_PLACES) or source.image
    if source.image is None:
        message = f"expected an image with a tag, found {found}; give --set IMAGE=NAME:TAG"
        source.report.add("problem", place, "DOCKER_IMAGE_ID", message)
    else:
        source.report.add("taken", place, f"DOCKER_IMAGE_ID={source.image}", "image")


def _answered(name: str, node: Node, answers: Answers, report: Report) -> str | None:
    if (answer := answers.get(name)) is not None:
        return answer
    if node.is_null:
        return ""
    if not node.is_scalar or node.is_encrypted or is_secret(name, node.text):
        report.add("secret" if node.is_scalar else "unmapped", node.place, name)
        return None
    try:
        names = {"ansible_env": {}, **answers.values}
        return str(expressions.evaluate(node.text, names))
    except expressions.Refused as error:
        message = f"expected a value, found {error}; give --set {name}=…"
        report.add("problem", node.place, name, message)
        return None


def _take_variable(name: str, value: str, place: Place, source: Source) -> None:
    report, what = source.report, f"{name}={value}"
    if name in _NAMES and is_placeholder(value):
        report.add("default", place, what, "container.names: a placeholder, so its default")
    elif name == "DOCKER_IMAGE_ID" and is_placeholder(value):
        pass  # the caller reports it
    elif is_placeholder(value):
        message = f"expected a value, found a placeholder; give --set {name}=…"
        report.add("problem", place, what, message)
    elif name in _TAKEN:
        if name in _NAMES:
            source.container_names[_NAMES[name]] = value
        elif attribute := _ATTRIBUTES.get(name):
            setattr(source, attribute, value or None)
        report.add("taken", place, what, _TAKEN[name])
    elif name in _USED:
        report.add("derived", place, what, "see the scripts that use it")
    elif name in _DROPPED:
        report.add("implied", place, what, _DROPPED[name])
    elif name.endswith("SOCKET_IFNAME"):
        report.add("derived", place, what, "the interface that owns the host's address")
    else:
        report.add("unmapped", place, what)


def read(listed: list[Entry], play: Node, source: Source, answers: Answers) -> None:
    """Enter what a playbook gives the inventory's servers and proxies into a source."""
    environment = environment_of(play, source, answers)
    variables = play.at("vars")
    nodes = variables.mapping if variables else {}
    texts = texts_of(nodes, environment, answers, source.report)
    reader = Reader(listed, source, environment, texts)
    run = nodes.get("docker_run_cmd")
    if run is not None:
        source.report.add("taken", run.place, "docker_run_cmd", "container")
        reader.read_run_command(run)
    for key, role in ((PREFILL, "prefill"), (DECODE, "decode")):
        if key not in nodes:
            message = "expected the script that starts its servers, found none"
            source.report.add("problem", play.place, f"vars.{key}", message)
        else:
            reader.read_servers(scripts.parse(nodes[key]), source.of(role))  # type: ignore[arg-type]
            source.report.add("taken", nodes[key].place, key, f"settings.{role}")
    if PROXY in nodes:
        reader.read_proxies(scripts.parse(nodes[PROXY]))
        source.report.add("taken", nodes[PROXY].place, PROXY, "proxy")
    for key, node in nodes.items():
        if key in (PREFILL, DECODE, PROXY, "docker_run_cmd"):
            continue
        if _IMPLIED_SCRIPT.fullmatch(key) or key in _DROPPED:
            source.report.add("implied", node.place, key, "pd-deploy's own stages do this")
        else:
            source.report.add("unmapped", node.place, key)


def texts_of(
    nodes: Mapping[str, Node],
    environment: Mapping[str, str | None],
    answers: Answers,
    report: Report,
) -> dict[str, Any]:
    """Return the values that scripts may refer to by Jinja: one-line variables, the environment."""
    names: dict[str, Any] = {**answers.values}
    names |= {"ansible_env": {k: v for k, v in environment.items() if v is not None}}
    for key, node in nodes.items():
        if node.is_scalar and "\n" not in node.text and not is_secret(key, node.text):
            answer = answers.get(key)
            try:
                names[key] = answer or expressions.evaluate(node.text, {**names, **answers.values})
            except expressions.Refused as error:
                report.add("problem", node.place, key, f"expected a value, found {error}")
    return names


class Reader:
    """Reads the scripts of one playbook for each server of its inventory."""

    def __init__(
        self,
        listed: list[Entry],
        source: Source,
        environment: Mapping[str, str | None],
        texts: Mapping[str, Any],
    ) -> None:
        self._source, self._environment, self._texts = source, environment, texts
        self._hostvars = {entry.name: entry.values for entry in listed}
        self._budget = Budget()
        self._mounts_code = False
        self._container: dict[str, str] = {}

    @property
    def budget(self) -> Budget:
        """The work that all scripts together may still take."""
        return self._budget

    def read_run_command(self, node: Node) -> None:
        script = scripts.parse(node)
        variables = {**dict.fromkeys(scripts.OF_CONTAINER), **self._environment}
        state = Shell(variables, budget=self._budget, templates=script.values(self._texts))
        for statement in script.statements:
            if not isinstance(statement, shell.Command):
                self._source.report.add("unmapped", script.place(statement), statement.text)
                continue
            words = [Argument(text, script.line(line)) for text, line in state.words(statement)]
            options = Options(self._source, self._environment)
            options.read([word for word in words[2:] if word.text != ""])
            self._mounts_code = options.mounts_code
            self._container = options.environment

    def read_servers(self, script: Script, servers: list[Server]) -> None:
        source = self._source
        for server in servers:
            for name, value in self._container.items():
                launcher.take_environment(name, value, server, script.node.place, source.report)
            run = scripts.reader_of(server, source.report, source.interfaces, self._take_directory)
            follower = Follower(source.report, self.names(server.name), self._budget, run)
            given = self.given(server)
            server.derived |= set(given)
            follower.follow(script, {**self._environment, **self._container, **given})
            if "kv_connector" not in server.kv and server.kv:
                server.kv["kv_connector"] = self._environment.get("KV_CONNECTOR")

    def read_proxies(self, script: Script) -> None:
        source = self._source
        for proxy in source.proxies:
            run = proxy_reader(proxy, source.report)
            follower = Follower(source.report, self.names(proxy.name), self._budget, run)
            port = str(proxy.port) if proxy.port else None
            environment = {"HOST": proxy.name, "PROXY_NODE_PORT": port, "NODE_PORT": port}
            follower.follow(script, {**self._environment, **self._container, **environment})

    def names(self, name: str) -> dict[str, Any]:
        """Return what expressions in the scripts of an instance may refer to."""
        return {
            **self._texts,
            **self._hostvars.get(name, {}),
            "inventory_hostname": name,
            "hostvars": self._hostvars,
        }

    def _take_directory(self, directory: str | None) -> None:
        if directory and (match := re.match(r"(/.*?)/omniinfer/tools/", directory)):
            code = match[1].rstrip("/")
            in_image = code == "/workspace" or not self._mounts_code
            self._source.code = None if in_image else code

    def given(self, server: Server) -> dict[str, str | None]:
        """Return what `docker exec` gives the start scripts of a server: it follows from the
        topology."""
        source = self._source
        devices = ",".join(map(str, server.devices))
        members = [other for other in source.of(server.role) if other.pod == server.pod]
        decodes = source.of("decode")
        role = "PREFILL" if server.role == "prefill" else "DECODE"
        ports = {
            "MASTER_PORT": server.master_port,
            "API_PORT": server.api_port,
            "ZMQ_PORT": server.zmq_port,
        }
        rank = list(dict.fromkeys(s.pod for s in source.of(server.role))).index(server.pod)
        variables: dict[str, str | None] = {
            **{name: str(port) if port else "" for name, port in ports.items()},
            "HOST": server.name,
            "HOST_IP": members[0].address,
            "SERVER_IP_LIST": ",".join(dict.fromkeys(d.address for d in decodes)),
            "PREFILL_POD_NUM": str(len(source.pods("prefill"))),
            "DECODE_POD_NUM": str(len(decodes)),
            "SOCKET_IFNAME": None,
            f"{role}_SERVER_LIST": devices,
        }
        if server.role == "prefill":
            return variables | {
                "IP": server.address,
                "KV_RANK": str(rank),
                "NNODES": str(len(members)),
                "NODE_RANK": str(server.node_rank),
                "NODE_IP_LIST": ",".join(dict.fromkeys(member.address for member in members)),
                "PREFILL_TENSOR_PARALLEL_SIZE": str(len(server.devices)),
            }
        every_device = [str(device) for decode in decodes for device in decode.devices]
        return variables | {
            "NUM_SERVERS": str(len(server.devices)),
            "DECODE_DATA_PARALLEL_SIZE": ",".join(every_device),
            "DECODE_TENSOR_PARALLEL_SIZE": self._environment.get("DECODE_TENSOR_PARALLEL_SIZE")
            or "1",
        }


class Options:
    """Reads the options of `docker run`."""

    _IMPLIED = ("-it", "-d", "-i", "-t", "--net", "--network", "--entrypoint", "--name", "-u",
                "--user", "-w", "--workdir", "--rm")  # fmt: skip
    _ALONE = ("-it", "-d", "-i", "-t", "--rm", "--privileged")

    def __init__(self, source: Source, environment: Mapping[str, str | None]) -> None:
        self._source, self._place = source, source.place
        self._ours = {
            value.rstrip("/"): name
            for name, value in environment.items()
            if value and name in ("LOG_PATH", "MODEL_PATH", "SCRIPTS_PATH", "CODE_PATH")
        }
        self.mounts_code = False
        self.environment: dict[str, str] = {}
        self._mounts: list[str] = []
        self._devices: list[str] = []

    def read(self, words: list[Argument]) -> None:
        """Enter the options into the source's container."""
        for name, value, place in self._options(words):
            self._place = place
            self._read(name, value)
        container = self._source.container
        container["mounts"] = [m for m in dict.fromkeys(self._mounts) if m]
        container["devices"] = list(dict.fromkeys(self._devices))

    def _options(self, words: list[Argument]) -> Iterator[tuple[str, str | None, Place]]:
        at = 0
        while at < len(words):
            text, place = words[at]
            name, equals, value = (text or "").partition("=")
            at += 1
            if not name.startswith("-"):
                yield "", name or None, place
            elif equals:
                yield name, value, place
            elif name in self._ALONE or at >= len(words):
                yield name, "", place
            else:
                yield name, words[at].text, place
                at += 1

    def _read(self, name: str, value: str | None) -> None:
        report, place, what = self._source.report, self._place, f"docker run {name} {value or ''}"
        if value is None:
            report.add("not expressible", place, f"docker run {name}", "its value is not known")
        elif name == "--shm-size":
            self._source.container["shm_size"] = value
            report.add("taken", place, what, "container.shm_size")
        elif name == "--privileged":
            self._source.container["privileged"] = value in ("", "true")
            report.add("taken", place, what, "container.privileged")
        elif name == "--device":
            path = value.split(":", maxsplit=1)[0]
            own = re.fullmatch(r"/dev/davinci\d+", path)
            self._devices += [] if own else [path]
            report.add("derived" if own else "taken", place, what, "container.devices")
        elif name in ("-v", "--volume"):
            self._mount(value, what)
        elif name in ("-e", "--env"):
            key, _, text = value.partition("=")
            self.environment[key] = text
            derived = key in launcher.DERIVED_ENVIRONMENT
            note = "" if derived else f"environment.{key}, of prefill and decode"
            report.add("derived" if derived else "taken", place, what, note)
        elif name in self._IMPLIED:
            report.add("implied", place, what)
        else:
            report.add("not expressible", place, what, "an option that pd-deploy does not set")

    def _mount(self, value: str, what: str) -> None:
        report, place = self._source.report, self._place
        source, _, rest = value.partition(":")
        target = rest.partition(":")[0] or source
        if target == "/etc/localtime":
            zone = source.partition("/usr/share/zoneinfo/")[2]
            self._source.container["time_zone"] = zone or "Asia/Shanghai"
            report.add("taken", place, what, "container.time_zone")
        elif source == "/tmp":  # noqa: S108
            note = "not mounted: nothing of pd-deploy's lies there (correction no-shared-tmp)"
            report.add("changed", place, what, note)
        elif source.rstrip("/") in self._ours:
            owner = self._ours[source.rstrip("/")]
            self.mounts_code |= owner == "CODE_PATH"
            report.add("derived", place, what, f"mounted anyway: {owner}")
        elif "ranktable" in source:
            report.add("implied", place, what, "ranktables lie below paths.state")
        else:
            self._mounts.append(value if source != target or rest.count(":") else source)
            report.add("taken", place, what, "container.mounts")


_PROXY_KEYS = {
    "listen-port": "port",
    "log-level": "log_level",
    "core-num": "core_num",
    "start-core-index": "start_core_index",
    "prefill-lb-sdk": "prefill_lb_sdk",
    "decode-lb-sdk": "decode_lb_sdk",
}
_PROXY_DERIVED = ("prefill-servers-list", "decode-servers-list", "prefill-endpoints",
                  "decode-endpoints", "log-file", "access-log-file", "nginx-conf-file",
                  "no-reuseport", "keepalive-nginx", "omni-proxy-model-path")  # fmt: skip
PROXY_SCRIPTS = {"global_proxy.sh": "global", "omni_proxy.sh": "omni"}


def proxy_reader(proxy: SourceProxy, report: Report) -> Run:
    """Return what enters the flags of a proxy's script into a source's proxy."""

    def run(program: str, words: list[Argument], place: Place) -> bool:
        if program == "export":
            name, value = (word.text or "" for word in words)
            if value and name == "PYTHONHASHSEED":
                proxy.environment[name] = as_scalar(value)
                report.add("taken", place, f"{name}={value}", "proxy.environment")
            else:
                report.add("implied", place, f"{name}", "of the proxy's script")
            return True
        if program not in PROXY_SCRIPTS:
            return False
        proxy.program = "omni" if PROXY_SCRIPTS[program] == "omni" else "global"
        report.add("taken", place, program, f"proxy: {proxy.program}_proxy")
        read_proxy_flags(words, proxy, report)
        return True

    return run


def read_proxy_flags(words: list[Argument], proxy: SourceProxy, report: Report) -> None:
    """Enter the flags of a proxy's script into a source's proxy."""
    for flag in launcher.flags(words):
        place = flag.place
        what = f"--{flag.name}" if flag.value is True else f"--{flag.name} {flag.value}"
        if flag.name in _PROXY_DERIVED:
            report.add("derived", place, f"--{flag.name}")
        elif not flag.name or flag.value is None:
            report.add("unmapped", place, f"proxy: {what}")
        elif flag.name in _PROXY_KEYS:
            key = _PROXY_KEYS[flag.name]
            is_text = key.endswith(("sdk", "level"))
            value = str(flag.value) if is_text else as_scalar(str(flag.value))
            if is_text or isinstance(value, int):
                setattr(proxy, key, value)
            report.add("taken", place, what, f"proxy.{key}")
        elif is_secret(flag.name, flag.value):
            report.add("secret", place, f"--{flag.name}")
        else:
            proxy.arguments[flag.name] = True if flag.value is True else as_scalar(str(flag.value))
            report.add("taken", place, what, f"proxy.arguments.{flag.name}")
