"""The stand-in's contracts v1 and roles: what serves, and what each refuses, naming the rule."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.lab.standin.processes import (
    LAUNCH,
    PYTHON,
    Answer,
    Instance,
    StandinSet,
    free_ports,
    hand_over,
    standin_set,
)
from pd_deploy.lab.system import wait_until

LATER = ("v1", "roles")
PROMPT = {"model": "qwen", "max_tokens": 20, "prompt": "how are you?"}
NUMBERS = PROMPT | {"prompt": "5, 7, 9, 11,", "max_tokens": 5}
LOCAL = 'standin:requests_by_source_total{source="local_compute"}'
Change = Callable[[StandinSet], object]


@pytest.fixture(scope="module", params=LATER)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StandinSet]:
    """A 2P1D set of each later contract, shared by tests in any order."""
    directory = tmp_path_factory.mktemp(request.param)
    with standin_set(directory, prefills=2, contract=request.param) as instances:
        instances.start()
        instances.wait_ready()
        yield instances


@pytest.fixture
def later(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandinSet]:
    """A 2P1D set that is not started, of the contract that the test is given."""
    with standin_set(tmp_path, prefills=2, contract=request.param) as instances:
        yield instances


each_later = pytest.mark.parametrize("later", LATER, indirect=True)
newest = pytest.mark.parametrize("later", ["roles"], indirect=True)  # where v1 is no different


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer.text
    return str(answer.body["choices"][0]["text"])


# What serves


@each_later
def test_each_prefill_links_at_its_first_request_and_decode_reads_its_kv(
    later: StandinSet,
) -> None:
    later.start(["p0"])
    later["p0"].wait_ready()  # which waits for no peer
    later.start(["p1", "d0"])
    later.wait_ready()
    decode = later["d0"]
    assert decode.metric("standin:links") == 0
    for count, name in enumerate(("p0", "p1"), start=1):
        assert text_of(hand_over(later[name], decode, NUMBERS)) == " 13, 15, 17"
        assert decode.metric("standin:links") == count
        assert later[name].metric("standin:links") == 1
        later[name].wait_for_metric("standin:kv_blocks_held", 0)
    assert decode.metric(LOCAL) == 0


def test_prefill_announces_its_workers_first_port_at_the_default_routes_address(
    running: StandinSet,
) -> None:
    prefill = running["p1"]
    offer = prefill.request("/v1/completions", PROMPT | {"max_tokens": 1}).body
    port = prefill.env["OMNI_LLMDATADIST_ZMQ_PORT"]
    assert offer["kv_transfer_params"]["remote_host_ip"] == f"tcp://{prefill.host}:{port}"


def test_kv_that_cannot_be_had_is_computed_unless_told_to_fail(running: StandinSet) -> None:
    first = running["p0"].request("/v1/completions", PROMPT | {"max_tokens": 1}).body
    elsewhere = first["kv_transfer_params"] | {"remote_host_ip": f"tcp://{running.address(9)}:1"}
    decode = running["d0"]
    errors = "standin:kv_transfer_errors_total"
    before = decode.metric(LOCAL), decode.metric(errors)
    answer = decode.request("/v1/completions", PROMPT | {"kv_transfer_params": elsewhere})
    assert text_of(answer) == text_of(decode.request("/v1/completions", PROMPT))
    assert (decode.metric(LOCAL), decode.metric(errors)) == (before[0] + 2, before[1] + 1)


def test_vllms_metrics_have_its_newer_labels(running: StandinSet) -> None:
    name = 'vllm:num_requests_running{engine="0",model_name="qwen"}'
    assert running["d0"].metric(name) == 0
    assert running["d0"].request("/version").body == {"version": "0.14.0+empty"}


@each_later
def test_failing_is_an_error_and_a_prefill_restarted_alone_serves_again(
    later: StandinSet,
) -> None:
    prefill, decode = later["p0"], later["d0"]
    decode.kv["kv_load_failure_policy"] = "fail"
    later.start(["p0", "d0"])
    for instance in (prefill, decode):
        instance.wait_ready()
    right = text_of(decode.request("/v1/completions", PROMPT))
    assert text_of(hand_over(prefill, decode, PROMPT)) == right
    prefill.stop()
    prefill.start()
    prefill.wait_ready()
    assert text_of(hand_over(prefill, decode, PROMPT)) == right
    prefill.set_faults(refuse_kv=True)
    answer = hand_over(prefill, decode, PROMPT)
    assert (answer.status, "fault refuse_kv" in answer.text) == (500, True)


@each_later
def test_what_no_later_contract_reads_is_harmless(later: StandinSet) -> None:
    for name in ("p0", "d0"):
        later[name].kv["kv_parallel_size"] = 99
        later[name].env |= {"RANK_TABLE_FILE_PATH": "/nonexistent", "VLLM_USE_V1": "0"}
        (later[name].root / "usr/bin/hccn_tool").unlink(missing_ok=True)
    later.start(["p0", "d0"])
    for name in ("p0", "d0"):
        later[name].wait_ready()
    assert text_of(hand_over(later["p0"], later["d0"], NUMBERS)) == " 13, 15, 17"


@newest
def test_kv_that_nobody_fetches_is_freed_after_a_while(later: StandinSet) -> None:
    prefill = later["p0"]
    prefill.env["BLOCK_RELEASE_DELAY"] = "0"
    later.start(["p0"])
    prefill.wait_ready()
    for _ in range(3):
        assert prefill.request("/v1/completions", PROMPT | {"max_tokens": 1}).status == 200
    assert prefill.metric("standin:kv_requests_held") == 1


@each_later
def test_the_servers_of_an_instance_have_devices_and_ports_of_their_own(later: StandinSet) -> None:
    decode = later["d0"]
    decode.args |= {"--num-servers": "2", "--num-dp": "2", "--tp": "4", "--max-port-attempts": "2"}
    later.start(["p0", "d0"])
    later["p0"].wait_ready()
    decode.wait_ready()
    second = Path(decode.args["--log-dir"]) / "server_1.log"
    decode.wait_for(lambda: "startup complete" in second.read_text(), "second server")
    assert "devices [4, 5, 6, 7], dp rank 1 of 2" in second.read_text()
    assert text_of(hand_over(later["p0"], decode, NUMBERS)) == " 13, 15, 17"


@pytest.mark.parametrize(
    ("faults", "status", "right"),
    [
        ({"error_status": 503}, 503, False),
        ({"garbage": True}, 200, False),
        ({"other_heads": True}, 200, False),
        ({"ignore_kv": True}, 200, True),
    ],
    ids=str,
)
def test_faults_are_those_of_every_contract(
    running: StandinSet, faults: dict[str, Any], status: int, right: bool
) -> None:
    decode = running["d0"]
    decode.set_faults(**faults)
    answer = hand_over(running["p0"], decode, NUMBERS)
    decode.set_faults()
    assert answer.status == status
    assert ('" 13, 15, 17"' in answer.text) == right


# What is refused


def env(name: str, **values: str) -> Change:
    return lambda later: later[name].env.update(values)


def unset(name: str, variable: str) -> Change:
    return lambda later: later[name].env.pop(variable)


def rename(name: str, old: str, new: str) -> Change:
    return lambda later: later[name].env.update({new: later[name].env.pop(old)})


def kv(name: str, **values: Any) -> Change:
    return lambda later: later[name].kv.update(values)


def args(name: str, **values: str) -> Change:
    flags = {f"--{key.replace('_', '-')}": value for key, value in values.items()}
    return lambda later: later[name].args.update(flags)


OF_BOTH: dict[str, tuple[str, str, Change]] = {
    "the connector of v0": ("kv-config", "p0", kv("p0", kv_connector="AscendHcclConnectorV1")),
    "another engine's connector": ("kv-config", "p0", kv("p0", kv_connector="NixlConnector")),
    "a field that there is not": ("kv-config", "p0", kv("p0", kv_side_port=1)),
    "a port that is none": ("kv-config", "p0", kv("p0", kv_port="tcp")),
    "a policy that there is not": ("kv-config", "d0", kv("d0", kv_load_failure_policy="retry")),
    "the other role": ("kv-role", "p0", kv("p0", kv_role="kv_consumer")),
    "no plug-in": ("plugins", "d0", env("d0", VLLM_PLUGINS="omni_npu_patches")),
    "an interface": ("interface", "d0", env("d0", HCCL_SOCKET_IFNAME="enp9s9f9")),
    "no model": ("model", "p0", args("p0", model_path="/nonexistent")),
    "fewer devices than workers": ("tp-devices", "p0", args("p0", tp="16")),
    "a device that there is not": (
        "device-choice",
        "p0",
        env("p0", ASCEND_RT_VISIBLE_DEVICES="9,10,11,12,13,14,15,16"),
    ),
    "a rank past the world": ("dp-world", "d0", args("d0", server_offset="8")),
}
OF_ROLES: dict[str, tuple[str, str, Change]] = {
    "pod numbers by their old name": (
        "env-missing",
        "p0",
        rename("p0", "OMNI_PD_PREFILL_POD_NUM", "PREFILL_POD_NUM"),
    ),
    "decode pods by their old name": (
        "env-missing",
        "d0",
        rename("d0", "OMNI_PD_DECODE_POD_NUM", "DECODE_POD_NUM"),
    ),
    "no role": ("env-missing", "p0", unset("p0", "OMNI_PD_ROLE")),
    "no such role": ("env-value", "p0", env("p0", OMNI_PD_ROLE="mixed")),
}
OF_V1: dict[str, tuple[str, str, Change]] = {
    "the connector of v0": OF_BOTH["the connector of v0"],
    "a role by its later name": ("env-missing", "p0", rename("p0", "ROLE", "OMNI_PD_ROLE")),
    "pod numbers by their later name": (
        "env-missing",
        "p0",
        rename("p0", "PREFILL_POD_NUM", "OMNI_PD_PREFILL_POD_NUM"),
    ),
}
CASES = [
    pytest.param(contract, *case, id=f"{contract}: {name}")
    for contract, cases in (("v1", OF_V1), ("roles", OF_BOTH | OF_ROLES))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("later", "rule", "name", "change"), CASES, indirect=["later"])
def test_a_contract_refuses_and_names_the_rule(
    later: StandinSet, rule: str, name: str, change: Change
) -> None:
    change(later)
    assert f"refused [{rule}, " in refusal(later[name])


def refusal(instance: Instance) -> str:
    instance.start()
    assert instance.exit_code() == 0, instance.launcher_log()
    return next(line for line in instance.log().splitlines() if "refused [" in line)


def test_roles_takes_the_old_name_of_the_role(tmp_path: Path) -> None:
    with standin_set(tmp_path, prefills=1, contract="roles") as instances:
        rename("p0", "OMNI_PD_ROLE", "ROLE")(instances)
        instances.start(["p0"])
        instances["p0"].wait_ready()


@each_later
def test_without_the_inventorys_devices_the_second_server_of_a_host_finds_them_held(
    later: StandinSet,
) -> None:
    for name in ("p0", "p1"):
        later[name].extra.remove("--use-inventory-devices")
    later.start(["p0"])
    later["p0"].wait_ready()
    assert "devices [0, 1, 2, 3, 4, 5, 6, 7]" in later["p0"].log()
    line = refusal(later["p1"])
    assert "refused [device-busy, " in line
    assert "device 0 " in line


@pytest.mark.parametrize(
    ("later", "variable", "step"),
    [
        ("v1", "OMNI_LLMDATADIST_ZMQ_PORT", 1),
        ("roles", "OMNI_LLMDATADIST_ZMQ_PORT", 7),
        ("v1", "VLLM_LLMDATADIST_BASE_PORT", 0),
    ],
    indirect=["later"],
)
def test_ports_of_workers_that_overlap_are_refused(
    later: StandinSet, variable: str, step: int
) -> None:
    """Eight workers need eight ports: a step of one between two instances is too little."""
    later["p1"].env[variable] = str(int(later["p0"].env[variable]) + step)
    later.start(["p0"])
    later["p0"].wait_ready()
    assert "refused [port, " in refusal(later["p1"])


@newest
def test_the_port_of_the_kv_config_wins_over_the_environment(later: StandinSet) -> None:
    prefill = later["p0"]
    prefill.kv["kv_port"] = int(prefill.env["OMNI_LLMDATADIST_ZMQ_PORT"])
    prefill.env["OMNI_LLMDATADIST_ZMQ_PORT"] = later["p1"].env["OMNI_LLMDATADIST_ZMQ_PORT"]
    later.start(["p0", "p1"])
    for name in ("p0", "p1"):
        later[name].wait_ready()


@newest
def test_the_zmq_port_by_its_old_name_is_only_a_warning(later: StandinSet) -> None:
    rename("d0", "OMNI_LLMDATADIST_ZMQ_PORT", "VLLM_LLMDATADIST_ZMQ_PORT")(later)
    later.start(["d0"])
    later["d0"].wait_ready()
    expected = "VLLM_LLMDATADIST_ZMQ_PORT is read by nothing"
    assert expected in later["d0"].log()


@newest
def test_a_larger_decode_cannot_read_a_smaller_prefill(later: StandinSet) -> None:
    prefill, decode = later["p0"], later["d0"]
    prefill.args["--tp"] = "4"
    prefill.env["ASCEND_RT_VISIBLE_DEVICES"] = "0,1,2,3"
    decode.kv["kv_load_failure_policy"] = "fail"
    later.start(["p0", "d0"])
    for instance in (prefill, decode):
        instance.wait_ready()
    answer = hand_over(prefill, decode, PROMPT)
    assert (answer.status, "rule tp-ratio" in answer.text) == (500, True)


@newest
def test_engine_flags_of_another_age_are_a_usage_error(later: StandinSet) -> None:
    foreign = "--preemption-mode swap --enable-reasoning --wat"
    later["p0"].args["--extra-args"] = f"--enforce-eager {foreign}"
    later["p0"].start()
    assert later["p0"].exit_code() == 0
    assert f"unrecognized arguments: {foreign}" in later["p0"].log()


# Launchers of all ages

REQUIRED = ["--model-path", "/m", "--master-ip", "10.0.0.1", "--served-model-name", "qwen"]
AGES = {
    "v0-early": {"built": "2025-08-12", "contract": "v0"},
    "v0 of March 2026": {"built": "2026-03-26", "contract": "v0"},
    "v1": {"contract": "v1"},
    "roles": {"contract": "roles"},
}
EVERYWHERE = ["--tp", "--num-dp", "--server-offset", "--max-port-attempts", "--enable-mtp"]
FLAGS = {
    "--pp": ["v0 of March 2026", "v1", "roles"],
    "--distributed-executor-backend": ["v0 of March 2026", "v1", "roles"],
    "--load-format": ["v0 of March 2026", "v1"],
    "--print-screen": ["v0 of March 2026", "v1"],
    "--use-inventory-devices": ["v1", "roles"],
}


def root_of(directory: Path, age: dict[str, str]) -> Path:
    image = directory / "usr/local/Ascend/latest/standin"
    image.mkdir(parents=True)
    for name, content in age.items():
        (image / name).write_text(content)
    return directory


def launch(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], "STANDIN_ROOT": str(root), **environment}
    return subprocess.run(
        [*LAUNCH, *arguments], env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("age", AGES)
def test_the_launchers_help_names_the_flags_of_its_age(tmp_path: Path, age: str) -> None:
    text = launch(root_of(tmp_path, AGES[age]), "--help").stdout
    known = [flag for flag in (*EVERYWHERE, *FLAGS) if f" {flag} " in text or f"[{flag}" in text]
    assert known == [*EVERYWHERE, *(flag for flag, ages in FLAGS.items() if age in ages)]


@pytest.mark.parametrize("age", AGES)
def test_a_flag_of_another_age_is_a_usage_error(tmp_path: Path, age: str) -> None:
    root = root_of(tmp_path, AGES[age])
    foreign = [flag for flag, ages in FLAGS.items() if age not in ages] or ["--wat"]
    done = launch(root, *REQUIRED, *foreign)
    assert done.returncode == 2
    assert all(flag in done.stderr for flag in foreign)


Recorder = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def first_port() -> Iterator[int]:
    """The launcher's, and room for those that follow."""
    with free_ports(10) as first:
        yield first


@pytest.fixture
def recorded(tmp_path: Path, first_port: int) -> Recorder:
    """Start so many servers of an age by the launcher; give each one's argv and environment."""
    recorder = tmp_path / "bin" / "vllm"
    recorder.parent.mkdir()
    record = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    # The launcher stops all servers when the first one ends: each stays until it is told.
    recorder.write_text(f"#!/bin/sh\n{PYTHON} -S -c '{record}' \"$@\"\nexec sleep 60\n")
    recorder.chmod(0o755)

    def start(age: str, servers: int, *arguments: str, **env: str) -> list[dict[str, Any]]:
        variables = {
            "PATH": f"{recorder.parent}:{os.environ['PATH']}",
            "STANDIN_ROOT": str(root_of(tmp_path / "root", AGES[age])),
            **env,
        }
        command = [*LAUNCH, *REQUIRED, "--num-servers", str(servers), *arguments]
        command += ["--base-api-port", str(first_port), "--log-dir", str(tmp_path)]
        logs = [tmp_path / f"server_{rank}.log" for rank in range(servers)]
        with subprocess.Popen(command, env=variables) as launcher:
            try:
                wait_until(
                    "the servers' records",
                    lambda: all(log.exists() and "\n" in log.read_text() for log in logs),
                    timeout=30,
                )
            finally:
                launcher.send_signal(signal.SIGINT)
        records = [json.loads(log.read_text().splitlines()[0]) for log in logs]
        return [{"argv": argv, "env": environment} for argv, environment in records]

    return start


@pytest.mark.parametrize(
    ("age", "offset", "ranks"),
    [
        ("v0-early", "2", ["2", "3"]),
        ("v0 of March 2026", "8", ["2", "3"]),
        ("v1", "8", ["2", "3"]),
        ("roles", "8", ["2", "3"]),
    ],
)
def test_the_offset_counts_servers_at_first_and_devices_later(
    recorded: Recorder, age: str, offset: str, ranks: list[str]
) -> None:
    arguments = ["--num-dp", "4", "--tp", "4", "--server-offset", offset]
    servers = recorded(age, 2, *arguments, OMNI_PD_ROLE="decode")
    assert [server["env"]["VLLM_DP_RANK"] for server in servers] == ranks


@pytest.mark.parametrize(
    ("age", "extra", "expected"),
    [
        ("v0 of March 2026", [], ["8,9,10,11", "8,9,10,11"]),
        ("v1", [], ["0,1", "2,3"]),
        ("roles", [], ["0,1", "2,3"]),
        ("v1", ["--use-inventory-devices"], ["8,9", "10,11"]),
        ("roles", ["--use-inventory-devices"], ["8,9", "10,11"]),
    ],
)
def test_later_launchers_give_each_server_its_devices_counted_from_zero_unless_told(
    recorded: Recorder, age: str, extra: list[str], expected: list[str]
) -> None:
    arguments = ["--num-dp", "2", "--tp", "2", *extra]
    servers = recorded(age, 2, *arguments, ASCEND_RT_VISIBLE_DEVICES="8,9,10,11")
    assert [server["env"]["ASCEND_RT_VISIBLE_DEVICES"] for server in servers] == expected


EXTRA = '--max-num-seqs 4 --compilation-config {"mode": "FULL"} --enforce-eager'


@pytest.mark.parametrize(
    ("age", "split"),
    [
        ("v1", ['{"mode":', '"FULL"}']),
        ("roles", ['{"mode": "FULL"}']),
    ],
)
def test_only_roles_keeps_a_compilation_config_with_blanks_together(
    recorded: Recorder, age: str, split: list[str]
) -> None:
    (server,) = recorded(age, 1, "--extra-args", EXTRA, "--tp", "1")
    start = server["argv"].index("--max-num-seqs")
    expected = ["--max-num-seqs", "4", "--compilation-config", *split, "--enforce-eager"]
    assert server["argv"][start : start + len(expected)] == expected


@pytest.mark.parametrize("age", list(AGES)[1:])
def test_newer_launchers_take_the_next_free_port_as_far_as_they_may(
    recorded: Recorder, first_port: int, tmp_path: Path, age: str
) -> None:
    with socket.create_server(("", first_port)):
        servers = recorded(age, 2, "--max-port-attempts", "2")
        ports = [server["argv"][server["argv"].index("--port") + 1] for server in servers]
        assert ports == [str(first_port + 1), str(first_port + 2)]
        alone = ["--base-api-port", str(first_port), "--max-port-attempts", "1"]
        done = launch(tmp_path / "root", *REQUIRED, *alone, "--log-dir", str(tmp_path))
        assert done.returncode == 1


def test_roles_tells_decode_alone_of_its_world(recorded: Recorder) -> None:
    arguments = ["--num-dp", "4", "--tp", "2", "--server-offset", "4"]
    (server,) = recorded("roles", 1, *arguments, OMNI_PD_ROLE="decode")
    argv = server["argv"]
    assert "--data-parallel-size-local" not in argv
    assert argv[argv.index("--data-parallel-size") + 1] == "4"
    assert argv[argv.index("--data-parallel-rank") + 1] == "2"
