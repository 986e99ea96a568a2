"""With `compat: upstream` every value of the golden file is matched; the exceptions stand here.

Without it, each difference is one of the corrections.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pd_deploy.config.topology import Instance
from pd_deploy.engines.base import Service
from pd_deploy.engines.omniinfer import corrections
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.lab.standin.processes import LAUNCHER
from pd_deploy.steps.verify import requests
from tests.unit import example

CHANGES = {
    "compat": "upstream",
    "code": "/data/local_code_path",
    "container": {
        "names": {role: f"you_name_omni_infer_{role}" for role in ("prefill", "decode", "proxy")}
    },
}
STATE = f"/var/lib/pd-deploy/qwq-3p1d/{example.GENERATION}"
LOGS = f"/data/log_path/qwq-3p1d/{example.GENERATION}"
# Paths of ours → the same upstream: they moved into the generation's directory, nothing else.
MOVED = {f"{STATE}/ranktables": "/tmp/ranktable_save_path", LOGS: "/data/log_path"}

CENTRAL = "ranktables are built in one place, not in the containers"
GENERATION = "moved into the generation's directory"
MAIN_PROCESS = "the server is its container's main process"
# Keys of the golden file, as patterns → why ours differs there.
EXCEPTIONS = {
    "_about.*": "says how the file was made",
    "edge_cases_measured.*": "other inventories: test_topology.py",
    "inventory.all.vars.ansible_*": "how hosts are reached; verified host keys, a Prefect block",
    "inventory.*.node_port": "a formula; its values are in derived_per_instance",
    "inventory.*.api_port": "a formula; its values are in derived_per_instance",
    "inventory.*.zmq_port": "a formula; its values are in derived_per_instance",
    "inventory.*.role": "informational, read by nothing",
    "cluster_ids.rule": "the rule in words",
    "derived_global.*_RANKTABLE_LIST": CENTRAL,
    "docker_argv.*.Generate the *": CENTRAL,
    "docker_argv.*.exec.-d": MAIN_PROCESS,
    "docker_argv.*.exec.runs.*": MAIN_PROCESS,
    "docker_argv.*.run.-d": MAIN_PROCESS,
    "docker_argv.*.run.-it": MAIN_PROCESS,
    "docker_argv.*.run.-v./tmp/scripts_path": GENERATION,
    "docker_argv.*.run.-v./tmp/ranktable_save_path": GENERATION,
    f"docker_argv.*.run.-v.{STATE}": GENERATION,
    "engine.*.vllm_env.GLOBAL_RANK_TABLE_FILE_PATH": GENERATION,
    "engine.*.vllm_env.RANK_TABLE_FILE_PATH": f"{GENERATION}, named after the pod",
    "engine.*.log_files.launcher": f"{MAIN_PROCESS}: its output is the container's log",
    "proxy.env_log.*": "a file of upstream's wrapper script; the lists are in proxy.argv",
    "ranktables.*_host.json.*": "read by nothing: the global document drops them",
    "ranktable_files_per_host.*": f"{GENERATION}; the documents are in `ranktables`",
    "start_order.[01235]": f"{MAIN_PROCESS}: nothing to kill, conditions in place of pauses",
    "smoke_test.body.temperature": "the same answer every time",
}


ABSENT = None
P0, D0 = "engine.p0.vllm_argv", "engine.d0.vllm_argv"
# Correction → a key where it shows → (upstream, ours), and patterns of all its other keys.
DIFFERENCES: dict[str, tuple[dict[str, tuple[Any, Any]], tuple[str, ...]]] = {
    "engine-ids": (
        {f"{D0}.--kv-transfer-config.engine_id": (0, 3)},
        ("*.engine_id", "derived_global.decode_engine_id"),
    ),
    "hccl-interface": (
        {"engine.p0.vllm_env.HCCL_SOCKET_IFNAME": (ABSENT, example.INTERFACE)},
        ("*.HCCL_SOCKET_IFNAME",),
    ),
    "fixed-ports": (
        {"engine.p1.start_api_servers_argv.--max-port-attempts": (ABSENT, "1")},
        ("*.--max-port-attempts",),
    ),
    "unbuffered-log": (
        {"engine.p2.vllm_env.PYTHONUNBUFFERED": (ABSENT, "1")},
        ("*.PYTHONUNBUFFERED",),
    ),
    "no-shared-tmp": ({"docker_argv.p0.run.-v./tmp": ("/tmp", ABSENT)}, ("*.-v./tmp",)),
    "proxy-environment": (
        {"docker_argv.c0.exec.-e.HOST": ("c0", ABSENT)},
        ("docker_argv.c0.exec.-e.*",),
    ),
    "batched-tokens": (
        {f"{P0}.--max-num-batched-tokens": ("40960", "61440")},
        ("*.--max-num-batched-tokens",),
    ),
    "prefill-memory": (
        {f"{P0}.--gpu-memory-utilization": ("0.88", "0.65")},
        ("engine.p?.*.--gpu-util", "engine.p?.*.--gpu-memory-utilization"),
    ),
    "expansion-mode": (
        {
            "engine.d0.vllm_env.HCCL_OP_EXPANSION_MOD": ("AIV", ABSENT),
            "engine.d0.vllm_env.HCCL_OP_EXPANSION_MODE": (ABSENT, "AIV"),
        },
        (),
    ),
    "gear-list": (
        {
            f"{D0}.--additional-config.decode_gear_list.0": (64, ABSENT),
            f"{D0}.--additional-config.graph_model_compile_config.decode_gear_list.0": (ABSENT, 64),
        },
        ("*.decode_gear_list.0",),
    ),
}
OF_OTHER_PROFILES = {"launch-blocking"}


@pytest.fixture(scope="module")
def service() -> Service:
    return example.for_engine(CHANGES)


def test_every_value_is_matched_but_for_the_exceptions(service: Service, tmp_path: Path) -> None:
    golden = flat(comparable(example.GOLDEN))
    ours = flat(comparable(moved(reproduced(service, tmp_path))))
    assert len(golden) > 900
    differing = {key for key in golden.keys() | ours.keys() if golden.get(key) != ours.get(key)}
    unexplained = [key for key in sorted(differing) if not reasons(key)]
    assert [(key, golden.get(key), ours.get(key)) for key in unexplained] == []
    unused = [p for p in EXCEPTIONS if not any(fnmatchcase(key, p) for key in differing)]
    assert unused == []


def test_each_correction_shows_where_it_says_and_nothing_else_differs(
    service: Service, tmp_path: Path
) -> None:
    for name in ("upstream", "ours"):
        (tmp_path / name).mkdir()
    upstream = flat(comparable(reproduced(service, tmp_path / "upstream")))
    corrected = example.for_engine({**CHANGES, "compat": None})
    ours = flat(comparable(reproduced(corrected, tmp_path / "ours")))
    differing = {k for k in upstream.keys() | ours.keys() if upstream.get(k) != ours.get(k)}
    for name, (shown, patterns) in DIFFERENCES.items():
        assert {k: (upstream.get(k), ours.get(k)) for k in shown} == shown, name
        differing -= {k for k in differing if any(fnmatchcase(k, p) for p in (*shown, *patterns))}
    assert differing == set()


def test_every_correction_of_a_value_is_stated() -> None:
    listed = {c.name for c in corrections.CORRECTIONS if c.where != "always"}
    assert listed == DIFFERENCES.keys() | OF_OTHER_PROFILES
    with pytest.raises(KeyError):
        corrections.corrected(example.service(), "unheard-of")


def test_deepseek_decode_does_not_block_on_launch() -> None:
    changes = {
        "profile": "deepseek-r1-a3-2p1d",
        "prefill": {"p2": None},
        "decode": {"d0": {"host": None, "hosts": ["b"], "devices": "0-7"}},
    }
    found = [
        omniinfer.environment(example.for_engine({**changes, "compat": compat}), "d0")
        for compat in ("upstream", None)
    ]
    assert [one["ASCEND_LAUNCH_BLOCKING"] for one in found] == ["1", "0"]


def test_deepseek_has_upstreams_memory_and_communication_settings_on_both_sides() -> None:
    service = example.for_engine(
        {
            "profile": "deepseek-r1-a3-2p1d",
            "prefill": {"p2": None},
            "decode": {"d0": {"devices": "0-7"}},
        }
    )
    for name in ("p0", "d0"):
        environment = omniinfer.environment(service, name)
        assert environment["VLLM_ENABLE_MC2"] == "1"
        assert environment["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"


def reasons(key: str) -> list[str]:
    return [why for pattern, why in EXCEPTIONS.items() if fnmatchcase(key, pattern)]


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Every leaf by the path of its key."""
    if isinstance(value, dict):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {key: value}
    return {
        k: v for name, inner in items for k, v in flat(inner, f"{key}.{name}".strip(".")).items()
    }


def moved(value: Any) -> Any:
    if isinstance(value, dict):
        return {moved(key): moved(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner) for inner in value]
    if isinstance(value, str):
        for ours, upstream in MOVED.items():
            value = value.replace(ours, upstream)
    return value


def comparable(document: dict[str, Any]) -> dict[str, Any]:
    """Argument lists as options, so that neither their order nor JSON's blanks matter."""
    result = dict(document)
    result["docker_argv"] = {
        name: {
            title if title.startswith("Generate") else argv[1]: docker_options(argv)
            for title, argv in calls.items()
        }
        for name, calls in document["docker_argv"].items()
    }
    result["engine"] = {
        name: engine
        | {
            "vllm_argv": options(engine["vllm_argv"]),
            "start_api_servers_argv": options(
                [
                    json.dumps(engine["kv_transfer_config_parsed"]) if "<json" in word else word
                    for word in engine["start_api_servers_argv"]
                ]
            ),
        }
        for name, engine in document["engine"].items()
    }
    return result


def docker_options(argv: list[str]) -> dict[str, Any]:
    """`docker run` or `docker exec` by option; variables and mounts by name."""
    found: dict[str, Any] = {"-e": {}, "-v": {}, "--device": []}
    words = iter(argv[2:])
    for word in words:
        name, _, value = word.partition("=")
        if word in ("-e", "-v"):
            key, _, inner = next(words).partition("=" if word == "-e" else ":")
            # A mount is known by where it appears.
            found[word] |= {key: inner} if word == "-e" else {inner: key}
        elif word in ("-u", "-w", "--name"):
            found[word] = next(words)
        elif name == "--device":
            found[name].append(value)
        elif word.startswith("-"):
            found[name] = value or True
        else:
            found["of"], rest = word, list(words)
            if rest:
                found["runs"] = rest
    return found


def options(argv: list[str]) -> dict[str, Any]:
    """A command line by option, with what `--extra-args` holds unpacked and JSON parsed."""
    found: dict[str, Any] = {"words": []}
    key = ""
    for word in argv:
        if key == "--extra-args":
            found[key] = options(word.split())
            key = ""
        elif word.startswith("--"):
            key = word
            found[key] = True
        elif key:
            found[key] = json.loads(word) if word.startswith("{") else word
            key = ""
        else:
            found["words"].append(word)
    return found


def reproduced(service: Service, directory: Path) -> dict[str, Any]:
    """What pd-deploy makes of the same service, in the golden file's shape."""
    placed = service.topology
    url, body = requests.completion(service.deployment, placed.proxies[0])
    return {
        "inventory": inventory(service),
        "derived_global": derived(service),
        "derived_per_instance": {name: per_instance(service, name) for name in placed.names},
        "docker_argv": {name: docker_argv(service, name) for name in placed.names},
        "engine": {i.name: engine(service, i, directory / i.name) for i in placed.instances},
        "proxy": proxy(service, directory),
        "ranktables": ranktables(service),
        "cluster_ids": cluster_ids(service),
        "start_order": start_order(service),
        "smoke_test": {"url": url, "body": body},
    }


def inventory(service: Service) -> dict[str, Any]:
    placed, ports = service.topology, service.deployment.ports
    shared = {
        i.name: {
            "ansible_host": i.address,
            "node_rank": i.node_rank,
            "host_ip": i.master_address,
            "ascend_rt_visible_devices": i.device_list,
        }
        for i in placed.instances
    }
    prefill = {pod.name: shared[pod.name] | {"kv_rank": pod.kv_rank} for pod in placed.prefill}
    return {
        "all": {
            "vars": {
                "global_port_base": ports.master,
                "base_api_port": ports.api,
                "base_zmq_port": ports.zmq,
                "proxy_port": placed.proxies[0].port,
                "port_offset": {"P": 0, "D": ports.decode_offset},
            },
            "children": {
                "P": {"hosts": prefill},
                "D": {"hosts": {pod.name: shared[pod.name] for pod in placed.decode}},
                "C": {"hosts": {"c0": {"ansible_host": placed.proxies[0].address, "node_rank": 0}}},
            },
        }
    }


def derived(service: Service) -> dict[str, Any]:
    placed = service.topology
    (decode,) = placed.decode
    environment = omniinfer.environment(service, "d0")
    transfer = omniinfer.kv_transfer_config(service, decode.master)
    argv = options(omniinfer.command(service, placed.proxies[0].name))
    launcher = options(omniinfer.command(service, "d0"))
    return {
        "PREFILL_API_SERVER_LIST": ",".join(s for pod in placed.prefill for s in pod.servers),
        "DECODE_API_SERVER_LIST": f"{decode.servers[0]}@{len(decode.servers) - 1}",
        "PREFILL_POD_NUM": int(environment["PREFILL_POD_NUM"]),
        "DECODE_POD_NUM": int(environment["DECODE_POD_NUM"]),
        "DECODE_SERVER_IP_LIST": environment["SERVER_IP_LIST"],
        "DECODE_SERVER_ALL": environment["DECODE_DATA_PARALLEL_SIZE"],
        "DECODE_SERVER_OFFSET": {"d0": int(launcher["--server-offset"])},
        "KV_PARALLEL_SIZE": transfer["kv_parallel_size"],
        "decode_kv_rank": transfer["kv_rank"],
        "decode_engine_id": transfer["engine_id"],
        "proxy_prefill_servers_list": argv["--prefill-servers-list"],
        "proxy_decode_servers_list": argv["--decode-servers-list"],
        "proxy_listen_port": int(argv["--listen-port"]),
    }


def per_instance(service: Service, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"container_name": container_name(service, name)}
    if name == service.topology.proxies[0].name:
        proxy = service.topology.proxies[0]
        return found | {"ansible_host": proxy.address, "node_port": proxy.port}
    environment = omniinfer.environment(service, name)
    pod = service.topology.pod_of(name)
    found |= {
        "ansible_host": pod.master.address,
        "host_ip": environment["HOST_IP"],
        "node_port": int(environment["MASTER_PORT"]),
        "api_port": int(environment["API_PORT"]),
        "zmq_port": int(environment["ZMQ_PORT"]),
    }
    if pod.role == "prefill":
        found |= {
            "kv_rank": int(environment["KV_RANK"]),
            "NODE_IP_LIST": environment["NODE_IP_LIST"],
            "NNODES": int(environment["NNODES"]),
        }
    return found


def container_name(service: Service, name: str) -> str:
    """A container's name without its generation."""
    made = omniinfer.container(service, name).name
    assert made.endswith(f"_{example.GENERATION}")
    return made.removesuffix(f"_{example.GENERATION}")


def docker_argv(service: Service, name: str) -> dict[str, list[str]]:
    """What `docker run` and `docker exec` would be for our container and our environment."""
    spec = omniinfer.container(service, name)
    environment = omniinfer.environment(service, name)
    passed = {
        "prefill": "MODEL_PATH MODEL_LEN_MAX_PREFILL PREFILL_SERVER_LIST IP HOST_IP MASTER_PORT "
        "PREFILL_TENSOR_PARALLEL_SIZE API_PORT ZMQ_PORT SERVER_IP_LIST PREFILL_POD_NUM "
        "SOCKET_IFNAME KV_RANK NNODES NODE_RANK NODE_IP_LIST HOST",
        "decode": "MODEL_PATH MODEL_LEN_MAX_DECODE DECODE_SERVER_LIST HOST_IP MASTER_PORT "
        "DECODE_TENSOR_PARALLEL_SIZE DECODE_DATA_PARALLEL_SIZE API_PORT ZMQ_PORT SERVER_IP_LIST "
        "PREFILL_POD_NUM DECODE_POD_NUM SOCKET_IFNAME NUM_SERVERS HOST",
        "proxy": "http_proxy https_proxy HOST PREFILL_LB_SDK DECODE_LB_SDK",
    }[{"p": "prefill", "d": "decode", "c": "proxy"}[name[0]]].split()
    assert spec.shm_size == 500 << 30
    assert spec.image == example.IMAGE
    run = [
        "docker", "run", "--shm-size=500g", f"--net={spec.network_mode}",
        f"--privileged={str(spec.privileged).lower()}", "-u", spec.user, "-w", spec.working_dir,
        *(word for key, value in spec.environment.items() for word in ("-e", f"{key}={value}")),
        *(f"--device={device}" for device in spec.devices),
        f"--entrypoint={''.join(spec.entrypoint or ())}",
        *(word for m in spec.mounts for word in ("-v", f"{m.source}:{m.target}")),
        "--name", container_name(service, name), "REPOSITORY:TAG",
    ]  # fmt: skip
    execute = [
        word for key in passed if key in environment for word in ("-e", f"{key}={environment[key]}")
    ]
    return {
        "run": [word or "" for word in run],
        "exec": ["docker", "exec", *execute, container_name(service, name)],
    }


def launcher() -> ModuleType:
    """The image's launcher, as a module."""
    spec = importlib.util.spec_from_file_location("start_api_servers", LAUNCHER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def engine(service: Service, instance: Instance, directory: Path) -> dict[str, Any]:
    """What the launcher makes of our arguments: a `vllm` that says what it was given."""
    argv = omniinfer.command(service, instance.name)
    environment = {
        **omniinfer.container(service, instance.name).environment,
        **omniinfer.environment(service, instance.name),
    }
    said = started(argv, environment, directory)
    script = omniinfer.start_script(service, instance.name)
    log_dir = argv[argv.index("--log-dir") + 1]
    found = {
        "host": instance.address,
        "container": container_name(service, instance.name),
        "cwd": next(w.split()[1] for w in script.splitlines() if w.startswith("cd ")),
        "vllm_argv": ["vllm", *said["argv"]],
        "vllm_env": {k: v for k, v in said["env"].items() if k not in ("PATH", "LC_CTYPE")},
        "kv_transfer_config_parsed": omniinfer.kv_transfer_config(service, instance),
        "log_files": {"server": f"{log_dir}/server_0.log"},
        "start_api_servers_argv": argv,
    }
    if "--additional-config" in argv:
        config = json.loads(argv[argv.index("--additional-config") + 1])
        found["additional_config_parsed"] = config
    return found


def started(argv: list[str], environment: dict[str, str], directory: Path) -> dict[str, Any]:
    directory.mkdir()
    vllm = directory / "vllm"
    vllm.write_text(
        f"#!{Path(sys.executable).resolve()} -IS\nimport json, os, sys\n"
        'print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}))\n'
    )
    vllm.chmod(0o755)
    module = launcher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv[1:])
        args = module.parse_arguments()
        args.log_dir = str(directory)
        for key in os.environ:
            patch.delenv(key)
        for key, value in {**environment, "PATH": str(directory)}.items():
            patch.setenv(key, value)
        assert module.start_server(args, 0, args.base_api_port).wait() == 0
    said: dict[str, Any] = json.loads((directory / "server_0.log").read_text())
    return said


def proxy(service: Service, directory: Path) -> dict[str, Any]:
    name = service.topology.proxies[0].name
    argv, script = omniinfer.command(service, name), omniinfer.start_script(service, name)
    (directory / "usr/local/nginx/conf").mkdir(parents=True)
    subprocess.run(
        ["bash", LAUNCHER.parent / "global_proxy.sh", *argv[2:], "--dry-run"],
        env=os.environ | {"STANDIN_ROOT": str(directory)},
        check=True,
    )
    conf = (directory / "usr/local/nginx/conf/nginx.conf").read_text()
    (cores,) = [line.split()[1:] for line in conf.splitlines() if "worker_cpu_affinity" in line]
    return {
        "host": service.topology.proxies[0].address,
        "container": container_name(service, name),
        "argv": argv,
        "cwd": [line.split()[1] for line in script.splitlines() if line.startswith("cd ")][-1],
        "worker_cpu_affinity": [core.rstrip(";") for core in cores],
    }


def ranktables(service: Service) -> dict[str, Any]:
    """Our documents under the names that upstream's have."""
    found = {}
    for host in service.deployment.hosts:
        files = omniinfer.ranktables(service)[host]
        for instance in service.topology.on_host(host):
            environment = omniinfer.environment(service, instance.name)
            devices = "".join(map(str, instance.devices))
            local = f"collect_files_{instance.role[0]}/local_ranktable_{instance.address}_{devices}"
            path = f"executor:/tmp/ranktable_save_path/{local}.json"
            found[path] = json.loads(files[environment["RANK_TABLE_FILE_PATH"]])
            path = "all hosts:/tmp/ranktable_save_path/global/global_ranktable_merge.json"
            found[path] = json.loads(files[environment["GLOBAL_RANK_TABLE_FILE_PATH"]])
    return found


def cluster_ids(service: Service) -> dict[str, Any]:
    path = omniinfer.environment(service, "p0")["GLOBAL_RANK_TABLE_FILE_PATH"]
    groups = json.loads(omniinfer.ranktables(service)["a"][path])["server_group_list"]
    counts = [len(group["server_list"][0]["device"]) for group in groups]
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    return {
        **dict(zip(("p0", "p1", "p2", "d0_base"), firsts, strict=True)),
        "d0_worker_ranks": list(range(firsts[-1], firsts[-1] + counts[-1])),
    }


def start_order(service: Service) -> dict[int, str]:
    """The steps that start servers, at their places in the golden list."""
    names = [i.name for i in service.topology.instances]
    after = {
        name: omniinfer.starts_after(service.deployment, service.topology, name) for name in names
    }
    first = [name for name in names if not after[name]]
    then = [name for name in names if after[name] == tuple(first)]
    return {
        4: f"start {','.join(first)} (docker exec -d)",
        6: f"start {','.join(then)} in parallel (docker exec -d)",
    }
