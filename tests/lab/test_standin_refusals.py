"""What the stand-in refuses, and that it names the rule. Real processes on loopback addresses."""

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.lab.standin.processes import StandinSet, standin_set

Change = Callable[[StandinSet], object]


def env(name: str, **values: str) -> Change:
    return lambda pair: pair[name].env.update(values)


def args(name: str, **values: str) -> Change:
    flags = {f"--{key.replace('_', '-')}": value for key, value in values.items()}
    return lambda pair: pair[name].args.update(flags)


def kv(name: str, **values: Any) -> Change:
    return lambda pair: pair[name].kv.update(values)


def unset(name: str, variable: str) -> Change:
    return lambda pair: pair[name].env.__setitem__(variable, "")


def edit_local(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    return lambda pair: edit_file(pair.local_path(name), edit)


def edit_global(edit: Callable[[dict[str, Any]], object]) -> Change:
    return lambda pair: edit_file(pair.global_path, edit)


def edit_both(name: str, index: int, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edit the instance's server in its local file and in the global one."""

    def change(pair: StandinSet) -> None:
        edit_file(pair.local_path(name), lambda table: edit(table["server_list"][0]))
        edit_file(
            pair.global_path,
            lambda table: edit(table["server_group_list"][index]["server_list"][0]),
        )

    return change


def edit_file(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def move(server: dict[str, Any]) -> None:
    server["server_ip"] = server["server_id"] = "192.0.2.1"


def remove(path: Callable[[StandinSet], Path]) -> Change:
    return lambda pair: path(pair).unlink()


CASES: dict[str, tuple[str, str, Change]] = {
    "role missing": ("p0", "env-missing", unset("p0", "ROLE")),
    "hccl timeout missing": ("p0", "env-missing", unset("p0", "HCCL_CONNECT_TIMEOUT")),
    "not V1": ("p0", "env-value", env("p0", VLLM_USE_V1="0")),
    "pod number no integer": ("p0", "env-value", env("p0", PREFILL_POD_NUM="one")),
    "gloo interface": ("p0", "interface", env("p0", GLOO_SOCKET_IFNAME="enp9s9f9")),
    "hccl interface": ("p0", "interface", env("p0", HCCL_SOCKET_IFNAME="enp9s9f9")),
    "no driver": (
        "p0",
        "driver",
        remove(lambda pair: pair["p0"].root / "usr/local/Ascend/driver/version.info"),
    ),
    "no model": ("p0", "model", args("p0", model_path="/nonexistent")),
    "kv role": ("p0", "kv-role", kv("p0", kv_role="kv_consumer")),
    "kv rank as text": ("p0", "kv-config", kv("p0", kv_rank="0")),
    "kv connector": ("p0", "kv-config", kv("p0", kv_connector="NixlConnector")),
    "kv rank of prefill": ("p0", "kv-rank", kv("p0", kv_rank=1)),
    "kv rank of decode": ("d0", "kv-rank", kv("d0", kv_rank=0)),
    "kv parallel size": ("d0", "kv-parallel-size", kv("d0", kv_parallel_size=5)),
    "device list": ("p0", "devices", env("p0", ASCEND_RT_VISIBLE_DEVICES="0-7")),
    "fewer devices": (
        "p0",
        "ranktable-instance",
        env("p0", ASCEND_RT_VISIBLE_DEVICES="0,1,2,3"),
    ),
    "prefill tp": ("p0", "tp-devices", args("p0", tp="4")),
    "decode tp": ("d0", "tp-devices", args("d0", tp="4")),
    "decode offset": ("d0", "dp-world", args("d0", server_offset="8")),
    "local file missing": ("p0", "ranktable-file", remove(lambda pair: pair.local_path("p0"))),
    "global file no JSON": (
        "p0",
        "ranktable-file",
        lambda pair: pair.global_path.write_text("{"),
    ),
    "local count as integer": (
        "p0",
        "ranktable-schema",
        edit_local("p0", lambda table: table.update(server_count=1)),
    ),
    "global count as text": (
        "p0",
        "ranktable-schema",
        edit_global(lambda table: table["server_group_list"][0].update(server_count="1")),
    ),
    "group id as integer": (
        "p0",
        "ranktable-schema",
        edit_global(lambda table: table["server_group_list"][0].update(group_id=0)),
    ),
    "rank ids from 1": (
        "p0",
        "ranktable-schema",
        edit_both("p0", 0, lambda server: server["device"].pop(0)),
    ),
    "device id as integer": (
        "p0",
        "ranktable-schema",
        edit_both("p0", 0, lambda server: server["device"][0].update(device_id=0)),
    ),
    "device ip no address": (
        "p0",
        "ranktable-schema",
        edit_both("p0", 0, lambda server: server["device"][0].update(device_ip="")),
    ),
    "scheduler group": (
        "p0",
        "ranktable-schema",
        edit_global(lambda table: table["server_group_list"].insert(0, {"group_id": "0"})),
    ),
    "local differs from global": (
        "p0",
        "ranktable-group",
        edit_local(
            "p0", lambda table: table["server_list"][0]["device"][0].update(device_ip="10.9.9.9")
        ),
    ),
    "local of the other role": (
        "p0",
        "ranktable-group",
        lambda pair: pair["p0"].env.update(RANK_TABLE_FILE_PATH=str(pair.local_path("d0"))),
    ),
    "server ip of another host": ("p0", "ranktable-instance", edit_both("p0", 0, move)),
    "device ip not hccn's": (
        "p0",
        "device-ip",
        edit_both("p0", 0, lambda server: server["device"][2].update(device_ip="10.9.9.9")),
    ),
    "device ip of another device": (
        "p0",
        "ranktable-schema",
        edit_global(
            lambda table: table["server_group_list"][1]["server_list"][0]["device"][0].update(
                device_ip="192.168.0.100"
            )
        ),
    ),
    "prefill pods": ("p0", "pod-count", env("p0", PREFILL_POD_NUM="2")),
    "decode pods": ("p0", "pod-count", env("p0", DECODE_POD_NUM="2")),
    "decode ips": ("p0", "decode-ips", env("p0", GLOBAL_DECODE_SERVER_IP_LIST="10.9.9.9")),
    "decode ip groups": (
        "d0",
        "decode-ips",
        lambda pair: pair["d0"].env.update(
            GLOBAL_DECODE_SERVER_IP_LIST=f"{pair['d0'].host};{pair['d0'].host}"
        ),
    ),
    "decode ip twice": (
        "d0",
        "decode-ips",
        lambda pair: pair["d0"].env.update(
            LOCAL_DECODE_SERVER_IP_LIST=f"{pair['d0'].host},{pair['d0'].host}",
            GLOBAL_DECODE_SERVER_IP_LIST=f"{pair['d0'].host},{pair['d0'].host}",
        ),
    ),
}


@pytest.mark.parametrize(("name", "rule", "change"), CASES.values(), ids=CASES.keys())
def test_refuses_and_names_the_rule(pair: StandinSet, name: str, rule: str, change: Change) -> None:
    change(pair)
    pair[name].start()
    assert pair[name].exit_code() == 0
    assert f"standin: refused [{rule}, contract " in pair[name].log()


def test_prefill_pods_of_different_sizes_are_refused(tmp_path: Path) -> None:
    """By everybody: p0 and decode know the sizes from the global ranktable."""
    with standin_set(tmp_path, prefills=2) as instances:

        def halve(server: dict[str, Any]) -> None:
            server["device"] = server["device"][:4]

        edit_both("p1", 1, halve)(instances)
        for name in instances.instances:
            instances[name].start()
            assert instances[name].exit_code() == 0
            line = "refused [prefill-sizes, contract 3.3]"
            assert line in instances[name].log()
        assert "devices of the prefill pods: [8, 4]" in instances["d0"].log()


def test_an_unknown_engine_flag_is_a_usage_error(pair: StandinSet) -> None:
    pair["p0"].args["--extra-args"] = "--max-num-sequences 64"
    pair["p0"].start()
    assert pair["p0"].exit_code() == 0
    assert "unrecognized arguments: --max-num-sequences 64" in pair["p0"].log()


def test_an_unknown_launcher_flag_is_a_usage_error(pair: StandinSet) -> None:
    pair["p0"].extra.append("--wat")
    pair["p0"].start()
    assert pair["p0"].exit_code() == 2
    assert "unrecognized arguments: --wat" in pair["p0"].launcher_log()


def test_a_taken_api_port_stops_the_launcher(pair: StandinSet) -> None:
    with socket.socket() as other:
        other.bind(("", pair["p0"].api_port))
        other.listen()
        pair["p0"].start()
        assert pair["p0"].exit_code() == 1
    assert f"API port {pair['p0'].api_port} is already in use" in pair["p0"].launcher_log()


@pytest.mark.parametrize("port_drifts", [True, False], ids=["drifts", "one attempt"])
def test_a_later_server_drifts_to_the_next_port_unless_forbidden(
    pair: StandinSet, port_drifts: bool
) -> None:
    decode = pair["d0"]
    decode.args |= {"--num-servers": "2", "--tp": "4"}
    decode.args["--max-port-attempts"] = "3" if port_drifts else "1"
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket())
        other.bind(("", decode.api_port + 1))
        other.listen()
        decode.start()
        if port_drifts:
            expected = f"port {decode.api_port + 2}"
            decode.wait_for(lambda: expected in decode.launcher_log(), expected)
            return
        assert decode.exit_code() == 1
    assert f"no free port in 1 attempt(s) from {decode.api_port + 1}" in decode.launcher_log()


def test_a_taken_zmq_port_is_refused(pair: StandinSet) -> None:
    port = int(pair["p0"].env["VLLM_LLMDATADIST_ZMQ_PORT"])
    with socket.socket() as other:
        other.bind((pair["p0"].host, port))
        other.listen()
        pair["p0"].start()
        assert pair["p0"].exit_code() == 0
    assert "refused [port, contract" in pair["p0"].log()


def test_a_device_in_use_is_refused(tmp_path: Path) -> None:
    # p0 and p1 share a host; p1 is told p0's devices, and a ranktable that agrees with it.
    with standin_set(tmp_path, prefills=2) as instances:
        instances["p0"].start()
        instances["p0"].wait_for(lambda: "Registering" in instances["p0"].log(), "p0's devices")
        instances.places["p1"] = (0, 0)
        ranktable = instances.global_path.read_text()
        instances.write_ranktables()
        instances.global_path.write_text(ranktable)
        second = instances["p1"]
        second.env["ASCEND_RT_VISIBLE_DEVICES"] = instances["p0"].env["ASCEND_RT_VISIBLE_DEVICES"]
        second.kv["kv_rank"] = 0
        second.start()
        assert second.exit_code() == 0
        assert "refused [device-busy, contract 4.6]" in second.log()
        assert "device 0 " in second.log()


def test_a_typo_in_the_environment_is_only_a_warning(pair: StandinSet) -> None:
    pair["d0"].env["HCCL_OP_EXPANSION_MOD"] = "AIV"
    pair.start()
    pair.wait_ready()
    assert "did you mean HCCL_OP_EXPANSION_MODE?" in pair["d0"].log()
