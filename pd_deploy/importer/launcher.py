"""Reading the command that starts an instance's servers, as upstream's launchers take it. Pure.

The launchers are start_api_servers.py, and the scripts around it, pd_run.sh and its variants, which
set some variables themselves. Also what environment of a launcher is anybody's: the topology's, the
image's, or the file's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pd_deploy.config.fields import Scalar
from pd_deploy.engines.omniinfer import rules
from pd_deploy.importer.report import Place, Report, is_secret
from pd_deploy.importer.source import Argument, Server, as_scalar, is_placeholder

LAUNCHERS = ("start_api_servers.py", "pd_run.sh", "pd_run_pangu_ultra_moe.sh")
OTHER_ENGINES = ("sglang.launch_server", "start_api_servers_sgl.py")
_SERVED_NAMES = {"pd_run.sh": "deepseek", "pd_run_pangu_ultra_moe.sh": "pangu_ultra_moe"}

# What the scripts export, whatever was exported before: all of them, pd_run.sh of summer 2025 and
# from October on, and the one for Pangu, which later playbooks take for all models.
_OF_PD_RUN = {
    "HCCL_CONNECT_TIMEOUT": "1800",
    "HCCL_EXEC_TIMEOUT": "120",
    "TNG_HOST_COPY": "1",
    "AUTO_USE_UC_MEMORY": "1",
    "USING_LCCL_COM": "0",
    "OMNI_USE_DSV3": "1",
    "HCCL_INTRA_ROCE_ENABLE": "1",
    "HCCL_INTRA_PCIE_ENABLE": "0",
    "VLLM_USE_V1": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}
_OF_PD_RUN_EARLY = {"TASK_QUEUE_ENABLE": "2"}
_OF_PD_RUN_LATER = {
    "TASK_QUEUE_ENABLE": "2",
    "HCCL_RDMA_TIMEOUT": "20",
    "ENABLE_OVERWRITE_REQ_IDS": "0",
}
_OF_PANGU = {"ENABLE_OVERWRITE_REQ_IDS": "1"}
_UNLESS_EXPORTED = {"VLLM_LOGGING_LEVEL": "INFO"}

_DERIVED = frozenset({
    "ascend-rt-visible-devices", "base-api-port", "decode-pod-num", "global-decode-server-ip-list",
    "global-rank-table-path", "gloo-socket-ifname", "kv-buffer-device", "kv-engine-id", "kv-rank",
    "kv-role", "local-decode-server-ip-list", "log-dir", "master-ip", "master-port",
    "max-port-attempts", "num-dp", "num-servers", "prefill-pod-num", "rank-table-path", "role",
    "server-offset", "tp-socket-ifname", "use-inventory-devices", "vllm-llmdatadist-zmq-port",
})  # fmt: skip
_OF_ENVIRONMENT = {
    "vllm-enable-mc2": "VLLM_ENABLE_MC2",
    "hccl-buffsize": "HCCL_BUFFSIZE",
    "hccl-op-expansion-mode": "HCCL_OP_EXPANSION_MODE",
    "model-extra-cfg-path": "MODEL_EXTRA_CFG_PATH",
    "hcc-intra-roce-enable": "HCCL_INTRA_ROCE_ENABLE",
    "hcc-intra-pcie-enable": "HCCL_INTRA_PCIE_ENABLE",
    "vllm-logging-level": "VLLM_LOGGING_LEVEL",
    "vllm-use-v1": "VLLM_USE_V1",
    "vllm-worker-multiproc-method": "VLLM_WORKER_MULTIPROC_METHOD",
}
_UNSET_BY = {"HCCL_BUFFSIZE": ("", "0"), "HCCL_OP_EXPANSION_MODE": ("",)}
_INEXPRESSIBLE = {
    "pp": "pipeline parallel size",
    "print-screen": "logs go to the container's log anyway",
    "llm-waiting-out": "a limit for waiting requests",
    "kv-producer-tp-size": "context parallel decode",
    "kv-producer-pp-size": "pipeline parallel prefill",
    "kv-producer-dp-size": "data parallel prefill",
}
_PORTS = {"base-api-port": "api_port", "master-port": "master_port",
          "vllm-llmdatadist-zmq-port": "zmq_port"}  # fmt: skip
_TABLE = {
    "gpu-util": "gpu_memory_utilization",
    "tp": "tensor parallel",
    "max-model-len": "max-model-len",
    "model-path": "model path",
    "served-model-name": "served name",
}
_LITERAL = ("num-servers", "num-dp", "server-offset")

DERIVED_ENVIRONMENT = rules.DERIVED_ENVIRONMENT | {
    "CODE_PATH", "DECODE_DATA_PARALLEL_SIZE", "DECODE_SERVER_LIST", "DECODE_TENSOR_PARALLEL_SIZE",
    "DEVICE_ID_STR", "HOST", "IP", "KV_PORT", "LOCAL_RANK_TABLE_FILE_PATH", "LOG_PATH",
    "MASTER_NODE_IP", "MODEL_LEN_MAX_DECODE", "MODEL_LEN_MAX_PREFILL", "MODEL_PATH", "NODE_PORT",
    "NUM_SERVERS",
    "OMNI_LLMDATADIST_ZMQ_PORT", "OMNI_PD_DECODE_POD_NUM", "OMNI_PD_PREFILL_POD_NUM",
    "OMNI_PD_ROLE", "PREFILL_SERVER_LIST", "PREFILL_TENSOR_PARALLEL_SIZE", "RANKTABLE_SAVE_PATH",
    "SCRIPTS_PATH", "SOCKET_IFNAME",
}  # fmt: skip
_OF_INTERFACE = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
# What the image's own ~/.bashrc exports, and omni_cli's files repeat.
_OF_IMAGE = re.compile(
    r"(ATB|ASDOPS|ASDSIP)_\w+|ASCEND_(AICPU|HOME|OPP)_PATH|ASCEND_TOOLKIT_HOME|TOOLCHAIN_HOME|"
    r"SHLVL|PATH|LD_LIBRARY_PATH|PYTHONPATH|OLDPWD|PWD|HOME"
)


@dataclass(frozen=True)
class Flag:
    """A flag of a command; the value of one that stands alone is True, an unknown one is None."""

    name: str
    value: str | bool | None
    place: Place


def flags(words: list[Argument]) -> Iterator[Flag]:
    """Take a command's flags apart: `--name value`, `--name=value`, or `--name` alone."""
    at = 0
    while at < len(words):
        word, place = words[at]
        at += 1
        if word is None or not word.startswith("--"):
            if word is None or word.strip():
                yield Flag("", word, place)
            continue
        name, equals, value = word[2:].partition("=")
        if equals:
            yield Flag(name, value, place)
        elif at < len(words) and _is_value(name, words[at].text):
            yield Flag(name, words[at].text, place)
            at += 1
        else:
            yield Flag(name, True, place)


def _is_value(name: str, word: str | None) -> bool:
    return word is None or name == "extra-args" or not word.startswith("--")


def read(words: list[Argument], program: str, server: Server, place: Place, report: Report) -> None:
    """Enter what a launcher's flags say into a server.

    Args:
        program: the launcher, by the name of its file.
    """
    given: dict[str, Flag] = {}
    for flag in flags(words):
        given[flag.name] = flag
        _read_flag(flag, server, report)
    if program.startswith("pd_run"):
        _add_defaults(given, program, server, place, report)


def _read_flag(flag: Flag, server: Server, report: Report) -> None:
    place = flag.place
    what = f"--{flag.name}" if flag.value is True else f"--{flag.name} {flag.value}"
    if flag.name in _DERIVED:
        _verify(flag, server)
        server.derived.add(f"--{flag.name}")
        report.add("derived", place, f"--{flag.name}")
    elif not flag.name:
        report.add("unmapped", place, f"a word of the command: {flag.value or 'unknown'}")
    elif flag.value is None:
        note = "its value is known only where the script runs"
        report.add("not expressible", place, f"--{flag.name}", note)
    elif is_secret(flag.name, flag.value):
        report.add("secret", place, f"--{flag.name}")
    elif isinstance(flag.value, str) and is_placeholder(flag.value):
        report.add("problem", place, what, "expected a value, found a placeholder")
    elif flag.name in _INEXPRESSIBLE or flag.name.startswith(("ray-", "kv-producer-")):
        note = _INEXPRESSIBLE.get(flag.name, "an option of the launcher's own")
        report.add("not expressible", place, what, note)
    else:
        _take(flag, server, report)


def _verify(flag: Flag, server: Server) -> None:
    """Keep the literal value of what pd-deploy derives; a literal port takes precedence."""
    if not isinstance(flag.value, str) or not re.fullmatch(r"\d{1,6}", flag.value):
        return
    if flag.name in _PORTS:
        setattr(server, _PORTS[flag.name], int(flag.value))
    elif flag.name in _LITERAL:
        server.literal[flag.name] = flag.value


def _take(flag: Flag, server: Server, report: Report) -> None:
    place = flag.place
    text = "" if flag.value is True else str(flag.value)
    server.places[_TABLE.get(flag.name, flag.name.replace("-", "_"))] = place
    what = f"--{flag.name} {text}".strip()
    if flag.name in _READERS:
        attribute, read_value = _READERS[flag.name]
        try:
            setattr(server, attribute, read_value(text))
        except ValueError:
            report.add("problem", place, what, "expected another value; see the launcher's help")
            return
        report.add("taken", place, what, attribute.replace("_", " "))
    elif flag.name in _OF_ENVIRONMENT:
        name = _OF_ENVIRONMENT[flag.name]
        server.environment.pop(name, None)
        server.places[f"environment.{name}"] = place
        if text not in _UNSET_BY.get(name, ()):
            server.environment[name] = text
        note = f"environment.{name}"
        if name == "MODEL_EXTRA_CFG_PATH":
            note += ", which images since October 2025 don't read"
        report.add("taken", place, what, note)
    elif flag.name == "kv-transfer-config":
        _take_kv(text, server, place, report)
    elif flag.name in ("kv-connector", "kv-parallel-size"):
        server.kv[flag.name.replace("-", "_")] = as_scalar(text)
        report.add("derived", place, what, "from the contract of the image's age")
    elif flag.name == "additional-config":
        server.additional_config = _object(text, what, place, report) or None
        report.add("taken", place, what, "additional_config")
    elif flag.name == "extra-args":
        for name, value in extra_arguments(text):
            take_argument(name, value, server, place, report)
    else:
        take_argument(flag.name, True if flag.value is True else text, server, place, report)


def _number(text: str) -> int:
    return int(text)


_READERS: Mapping[str, tuple[str, Any]] = {
    "gpu-util": ("gpu_memory_utilization", float),
    "gpu-memory-utilization": ("gpu_memory_utilization", float),
    "tp": ("tensor_parallel", _number),
    "tensor-parallel-size": ("tensor_parallel", _number),
    "max-model-len": ("max_len", _number),
    "model-path": ("model_path", str),
    "served-model-name": ("served_name", str),
    "model-name": ("served_name", str),
}


def _take_kv(text: str, server: Server, place: Place, report: Report) -> None:
    config = _object(text, "--kv-transfer-config", place, report)
    take_kv(config, server, place, report)


def take_kv(config: Mapping[str, Any], server: Server, place: Place, report: Report) -> None:
    """Enter a KV transfer configuration into a server."""
    server.kv.update(config)
    for name, value in config.items():
        server.places[name] = place
        report.add("derived", place, f"kv_transfer_config.{name} {value}", "from the topology")


def _object(text: str, what: str, place: Place, report: Report) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        report.add("problem", place, what, "expected a JSON object, found something else")
        return {}
    return value


def take_argument(
    name: str, value: str | bool, server: Server, place: Place, report: Report
) -> None:
    """Enter an argument of vLLM, or a switch of the launcher, into a server."""
    what = f"--{name}" if value is True else f"--{name} {value}"
    key = name.replace("_", "-")
    if key == "distributed-executor-backend":
        note = "ray where a prefill spans hosts, else vLLM's own choice"
        report.add("derived" if value == "ray" else "not expressible", place, what, note)
    elif key in rules.DERIVED_ARGUMENTS:
        report.add("derived", place, what)
    elif is_secret(name, value):
        report.add("secret", place, f"--{name}")
    elif not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        report.add("unmapped", place, what)
    else:
        server.arguments[name] = _argument(value)
        server.places[f"arguments.{name}"] = place
        report.add("taken", place, what, f"arguments.{name}")


def _argument(value: str | bool) -> Scalar:
    if value is True or value == "":
        return True
    text = str(value)
    if text[:1] in "{[":
        try:
            return json.dumps(json.loads(text), separators=(",", ":"))
        except (ValueError, RecursionError):
            return text
    return as_scalar(text)


def extra_arguments(text: str) -> Iterator[tuple[str, str | bool]]:
    """Split the text of --extra-args into names and values; a JSON value may have blanks."""
    pieces: list[str] = []
    depth, in_string = 0, False
    for word in text.split():
        starts = word.startswith("--") and depth == 0 and not in_string
        if starts or not pieces:
            pieces.append(word)
        else:
            pieces[-1] += f" {word}"
        for index, char in enumerate(word):
            if char == '"' and word[index - 1 : index] != "\\":
                in_string = not in_string and depth > 0
            elif not in_string:
                depth += (char in "{[") - (char in "}]")
    for piece in pieces:
        head, blank, value = piece.partition(" ")
        name, equals, text_of = head.removeprefix("--").partition("=")
        if equals:
            yield name, text_of + blank + value
        else:
            yield name, _unquoted(value) if value else True


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def _add_defaults(
    given: Mapping[str, Flag], program: str, server: Server, place: Place, report: Report
) -> None:
    """Add what pd_run.sh does by itself: names, switches and variables."""
    is_old = "num-speculative-tokens" not in given and "kv-connector" not in given
    further = _OF_PD_RUN_EARLY if is_old else _OF_PD_RUN_LATER
    defaults = _OF_PD_RUN | (_OF_PANGU if "pangu" in program else further)
    defaults |= {k: v for k, v in _UNLESS_EXPORTED.items() if k not in server.environment}
    set_by_flag = {_OF_ENVIRONMENT[name] for name in given if name in _OF_ENVIRONMENT}
    for name, value in defaults.items():
        if name not in set_by_flag:
            if server.environment.get(name) != value:
                note = f"environment.{name}: {program} sets it, whatever was exported before"
                report.add("taken", place, f"{program}: {name}={value}", note)
            server.environment[name] = value
            server.places[f"environment.{name}"] = place
    if server.served_name is None:
        server.served_name = _SERVED_NAMES[program]
        report.add("taken", place, f"{program}: {server.served_name}", "served name")
    tokens = server.arguments.get("num-speculative-tokens")
    if tokens in (0, "0"):
        del server.arguments["num-speculative-tokens"]
    else:
        server.arguments["enable-mtp"] = True
        report.add("taken", place, f"{program}: --enable-mtp", "arguments.enable-mtp")


def take_environment(
    name: str, value: str | None, server: Server, place: Place, report: Report
) -> str | None:
    """Enter an exported variable into a server, unless it follows from something else.

    Returns:
        The name of the interface, if that is what the variable tells.
    """
    what = name if value is None else f"{name}={value}"
    if name in _OF_INTERFACE:
        server.derived.add(name)
        note = "the interface that owns the host's address; `hosts.<name>.interface` overrides it"
        report.add("derived", place, name if not value else what, note)
        return value or None
    if name in DERIVED_ENVIRONMENT or name.startswith("RAY_"):
        server.derived.add(name)
        report.add("derived", place, what if len(what) < 60 else name)
    elif value is None:
        note = "its value is known only where the script runs"
        report.add("not expressible", place, name, note)
    elif is_secret(name, value):
        report.add("secret", place, name, "give it in the image, or where the host keeps secrets")
    elif is_placeholder(value):
        report.add("problem", place, what, "expected a value, found a placeholder")
    elif _OF_IMAGE.fullmatch(name):
        report.add("default", place, what, "the image's own ~/.bashrc sets it")
    else:
        server.environment[name] = value
        server.places[f"environment.{name}"] = place
        report.add("taken", place, what, f"environment.{name}")
    return None
