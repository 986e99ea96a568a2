"""The stand-in engine: linking, hand-over of KV, faults. Real processes on loopback addresses."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.lab.standin.processes import (
    LAUNCHER,
    PYTHON,
    STANDIN,
    TIMEOUT_SECONDS,
    Answer,
    Instance,
    StandinSet,
    hand_over,
    standin_set,
)

PROMPT = {"model": "qwen", "max_tokens": 50, "prompt": "how are you?"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinSet]:
    """A 3P1D set that serves. Its tests run in any order, so they compare counters with before."""
    with standin_set(tmp_path_factory.mktemp("standin"), prefills=3) as instances:
        instances.start()
        instances.wait_ready()
        yield instances


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer.text
    return str(answer.body["choices"][0]["text"])


# Linking


def test_cluster_ids_run_over_the_devices_of_the_groups(running: StandinSet) -> None:
    found = {name: running[name].log().split("cluster id ")[1].split(",")[0] for name in PODS}
    assert found == PODS


PODS = {"p0": "0", "p1": "8", "p2": "16", "d0": "24"}


def test_every_pod_links_with_all_peers_of_the_other_role(running: StandinSet) -> None:
    links = {name: running[name].metric("standin:links") for name in PODS}
    assert links == {"p0": 1, "p1": 1, "p2": 1, "d0": 3}


def test_nobody_answers_before_the_last_peer_has_linked(tmp_path: Path) -> None:
    with standin_set(tmp_path, prefills=2) as instances:
        instances.start(["p0", "d0"])
        instances["d0"].wait_for(lambda: "linked with" in instances["d0"].log(), "first link")
        assert instances["p0"].refuses_connections()
        assert instances["d0"].refuses_connections()
        instances["p1"].start()
        instances.wait_ready()


def test_a_peer_that_never_comes_ends_the_wait_after_hccl_connect_timeout(
    pair: StandinSet,
) -> None:
    pair["p0"].env["HCCL_CONNECT_TIMEOUT"] = "1"
    pair["p0"].start()
    assert pair["p0"].exit_code() == 0
    assert "no link with decode after HCCL_CONNECT_TIMEOUT=1 s" in pair["p0"].log()


def test_different_global_ranktables_fail_the_link_on_both_sides(pair: StandinSet) -> None:
    other = pair.directory / "other.json"
    other.write_text(json.dumps(json.loads(pair.global_path.read_text()) | {"note": "other"}))
    pair["d0"].env["GLOBAL_RANK_TABLE_FILE_PATH"] = str(other)
    pair.start()
    for name in ("p0", "d0"):
        assert pair[name].exit_code() == 0
        assert "RuntimeError: link status FAILED" in pair[name].log()


def test_a_lone_restart_cannot_rejoin(pair: StandinSet) -> None:
    pair.start()
    pair.wait_ready()
    pair["d0"].stop()
    pair["d0"].start()
    assert pair["d0"].exit_code() == 0
    assert "cluster 8 is linked already" in pair["d0"].log()
    assert pair["p0"].request("/health").status == 200
    assert pair["p0"].metric("standin:links") == 0


# Serving


def test_models_names_the_served_model(running: StandinSet) -> None:
    models = running["p1"].request("/v1/models").body["data"]
    assert [model["id"] for model in models] == ["qwen"]


@pytest.mark.parametrize("prefill", ["p0", "p1", "p2"])
def test_kv_moves_from_the_prefill_that_holds_it_and_is_released(
    running: StandinSet, prefill: str
) -> None:
    moved = f'standin:kv_transfers_total{{cluster_id="{PODS[prefill]}"}}'
    before = running["d0"].metric(moved, missing=0)
    held = running[prefill].metric("standin:kv_blocks_held")
    local = text_of(running["d0"].request("/v1/completions", PROMPT))
    assert text_of(hand_over(running[prefill], running["d0"], PROMPT)) == local
    assert running["d0"].metric(moved) == before + 1
    running[prefill].wait_for_metric("standin:kv_blocks_held", held)


def test_decode_counts_what_it_computed_itself(running: StandinSet) -> None:
    name = 'vllm:prompt_tokens_by_source_total{source="local_compute"}'
    before = running["d0"].metric(name)
    usage = running["d0"].request("/v1/completions", PROMPT).body["usage"]
    assert running["d0"].metric(name) == before + usage["prompt_tokens"]


def test_output_depends_on_the_prompt(running: StandinSet) -> None:
    other = PROMPT | {"prompt": "how are they?"}
    answers = [running["d0"].request("/v1/completions", body) for body in (PROMPT, other)]
    assert text_of(answers[0]) != text_of(answers[1])


def test_prefill_offers_kv_with_its_address(running: StandinSet) -> None:
    answer = running["p2"].request("/v1/completions", PROMPT | {"max_tokens": 1}).body
    params = answer["kv_transfer_params"]
    zmq_port = running["p2"].env["VLLM_LLMDATADIST_ZMQ_PORT"]
    assert params["remote_host_ip"] == f"tcp://{running['p2'].host}:{zmq_port}"
    assert params["remote_cluster_id"] == 16
    assert len(params["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]


def test_prefill_offers_no_kv_when_its_token_ended_the_answer(running: StandinSet) -> None:
    body = PROMPT | {"prompt": "bye<|endoftext|>", "max_tokens": 1}
    answer = running["p0"].request("/v1/completions", body).body
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["kv_transfer_params"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remote_cluster_id": 99}, "no link with cluster 99"),
        ({"remote_block_ids": [4711]}, "does not hold these blocks"),
        ({"remote_cluster_id": 8}, "does not hold these blocks"),
        ({"prompt_token_ids": [1, 2]}, "is of another prompt"),
    ],
)
def test_decode_refuses_kv_it_cannot_have(
    running: StandinSet, change: dict[str, Any], message: str
) -> None:
    # A prompt of its own length, so that no other prefill holds equal blocks.
    body = PROMPT | {"prompt": "word " * 700}
    first = running["p0"].request("/v1/completions", body | {"max_tokens": 1}).body
    params = first["kv_transfer_params"] | change
    answer = running["d0"].request("/v1/completions", body | {"kv_transfer_params": params})
    assert answer.status == 500
    assert message in answer.body["message"]


def test_streamed_and_whole_answers_are_equal(running: StandinSet) -> None:
    whole = text_of(running["d0"].request("/v1/completions", PROMPT))
    streamed = running["d0"].request("/v1/completions", PROMPT | {"stream": True})
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_chat_streams_usage_when_asked(running: StandinSet) -> None:
    body = {
        "model": "qwen",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    streamed = running["d0"].request("/v1/chat/completions", body).text
    assert '"usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}' in streamed


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "`other` does not exist"),
        ({"max_tokens": 70000}, 400, "maximum context length is 61244"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"n": 2}, 400, "one choice"),
        ({"stream_options": {"include_usage": True}}, 400, "only be defined when `stream=True`"),
    ],
)
def test_bad_requests_are_rejected(
    running: StandinSet, change: dict[str, Any], status: int, message: str
) -> None:
    answer = running["d0"].request("/v1/completions", PROMPT | change)
    assert answer.status == status
    assert message in answer.body["message"]


def test_a_prompt_over_the_token_budget_blocks_the_queue_until_its_client_leaves(
    running: StandinSet,
) -> None:
    prefill = running["p0"]
    body = json.dumps(PROMPT | {"prompt": "x " * 41000, "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    answers: list[Answer] = []
    with socket.create_connection((prefill.host, prefill.api_port)) as stuck:
        stuck.sendall(head.encode() + body)
        prefill.wait_for_metric("vllm:num_requests_waiting", 1)
        behind = threading.Thread(
            target=lambda: answers.append(prefill.request("/v1/completions", PROMPT))
        )
        behind.start()
        prefill.wait_for_metric("vllm:num_requests_waiting", 2)
        assert answers == []
    behind.join(TIMEOUT_SECONDS)
    assert [answer.status for answer in answers] == [200]


# Sequences of numbers

NUMBERS = {"model": "qwen", "max_tokens": 5}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("1, 2, 3, 4, 5,", " 6, 7, 8"),
        ("Go on: 8, 9, 10, 11, 12,", " 13, 14, 15"),
        ("5 10 15", " 20, 25, 30"),
        ("100, 98, 96", " 94, 92, 90"),
        ("0,0,0,", " 0, 0, 0"),
        ("7, 1, 2, 3", " 4, 5, 6"),
        ("1997,1998,1999,", " 2000, 2001, 2002"),
    ],
)
def test_a_sequence_of_numbers_is_continued(running: StandinSet, prompt: str, text: str) -> None:
    for answer in (
        running["d0"].request("/v1/completions", NUMBERS | {"prompt": prompt}),
        hand_over(running["p1"], running["d0"], NUMBERS | {"prompt": prompt}),
    ):
        assert text_of(answer) == text


def test_prefill_gives_the_first_token_of_a_sequence(running: StandinSet) -> None:
    body = NUMBERS | {"prompt": "8, 9, 10, 11, 12,", "max_tokens": 1}
    assert text_of(running["p0"].request("/v1/completions", body)) == " 13"


@pytest.mark.parametrize(
    "prompt", ["1, 2,", "1, 2, 4,", "1, 2, 3, go", "1;2;3;", "1,, 2,, 3", "07 08 09", "x"]
)
def test_other_prompts_are_not_continued_in_numbers(running: StandinSet, prompt: str) -> None:
    text = text_of(running["d0"].request("/v1/completions", NUMBERS | {"prompt": prompt}))
    assert not any(character.isdigit() for character in text)


def test_a_sequence_ends_where_the_numbers_with_tokens_end(running: StandinSet) -> None:
    body = NUMBERS | {"prompt": "9996, 9997, 9998,"}
    text = text_of(running["d0"].request("/v1/completions", body))
    assert text.startswith(" 9999, ")
    assert text.split()[1].isalpha()


def test_an_answer_in_numbers_ends_by_itself(running: StandinSet) -> None:
    body = NUMBERS | {"prompt": "1, 2, 3,", "max_tokens": 1000}
    answer = running["d0"].request("/v1/completions", body).body
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 64 <= answer["usage"]["completion_tokens"] < 256


def test_a_chat_continues_the_sequence_of_its_last_message(running: StandinSet) -> None:
    messages = [
        {"role": "system", "content": "Count: 1, 2, 3"},
        {"role": "user", "content": [{"type": "text", "text": "Go on: 20, 30, 40,"}]},
    ]
    answer = running["d0"].request("/v1/chat/completions", NUMBERS | {"messages": messages})
    assert answer.body["choices"][0]["message"]["content"] == " 50, 60, 70"


# Faults and deaths


@pytest.mark.parametrize(
    ("faults", "status", "text"),
    [({"error_status": 503}, 503, "fault"), ({"garbage": True}, 200, "")],
)
def test_faults_apply_at_the_next_request(
    running: StandinSet, faults: dict[str, Any], status: int, text: str
) -> None:
    running["d0"].set_faults(**faults)
    try:
        answer = running["d0"].request("/v1/completions", PROMPT)
    finally:
        running["d0"].set_faults()
    assert answer.status == status
    assert text in answer.text
    assert "choices" not in answer.text


def test_slow_adds_seconds_to_a_request(running: StandinSet) -> None:
    running["d0"].set_faults(slow=0.3)
    begin = time.monotonic()
    running["d0"].request("/v1/completions", PROMPT)
    running["d0"].set_faults()
    assert time.monotonic() - begin >= 0.3


def test_refuse_kv_shows_as_an_error_of_decode(running: StandinSet) -> None:
    running["p1"].set_faults(refuse_kv=True)
    answer = hand_over(running["p1"], running["d0"], PROMPT)
    running["p1"].set_faults()
    assert answer.status == 500
    assert "refuse_kv" in answer.body["message"]


def test_ignore_kv_is_counted_as_computed_locally(running: StandinSet) -> None:
    name = 'standin:requests_by_source_total{source="local_compute"}'
    before = running["d0"].metric(name)
    running["d0"].set_faults(ignore_kv=True)
    hand_over(running["p0"], running["d0"], PROMPT)
    running["d0"].set_faults()
    assert running["d0"].metric(name) == before + 1


@pytest.mark.parametrize("body", [PROMPT, NUMBERS | {"prompt": "8, 9, 10,"}])
def test_other_heads_makes_garbage_that_nothing_notices(
    running: StandinSet, body: dict[str, Any]
) -> None:
    right = text_of(hand_over(running["p0"], running["d0"], body))
    source = 'standin:requests_by_source_total{source="external_kv_transfer"}'
    errors = "standin:kv_transfer_errors_total"
    before = {name: running["d0"].metric(name) for name in (source, errors)}
    running["d0"].set_faults(other_heads=True)
    wrong = text_of(hand_over(running["p0"], running["d0"], body))
    own = text_of(running["d0"].request("/v1/completions", body))
    running["d0"].set_faults()
    assert wrong != right
    assert wrong.replace(",", " ").split()[0] == right.replace(",", " ").split()[0]
    assert own == right
    assert running["d0"].metric(source) == before[source] + 1
    assert running["d0"].metric(errors) == before[errors]


def test_a_crash_ends_the_launcher_with_a_traceback(pair: StandinSet) -> None:
    pair["p0"].set_faults(crash_after=0.3, exit_code=7)
    pair["p0"].start()
    assert pair["p0"].exit_code() == 0, "only the log tells what the server died of"
    assert "exited with code 7" in pair["p0"].launcher_log()
    assert pair["p0"].log().splitlines()[-1].startswith("RuntimeError: NPU out of memory")


def test_a_hanging_instance_holds_its_peers(pair: StandinSet) -> None:
    pair["d0"].env["HCCL_CONNECT_TIMEOUT"] = "1"
    pair["p0"].set_faults(hang=True)
    pair.start()
    assert pair["d0"].exit_code() == 0
    assert pair["p0"].refuses_connections()


def test_an_unknown_fault_is_refused(pair: StandinSet) -> None:
    pair["p0"].set_faults(craash_after=1)
    pair["p0"].start()
    assert pair["p0"].exit_code() == 0
    assert "found ['craash_after']" in pair["p0"].log()


def test_the_launcher_ends_when_its_server_is_killed(pair: StandinSet) -> None:
    pair["p0"].start()
    pair["p0"].wait_for(lambda: "pid " in pair["p0"].launcher_log(), "server")
    pair["p0"].kill_server()
    assert pair["p0"].exit_code() == 0


def test_sigint_stops_launcher_and_server(pair: StandinSet) -> None:
    pair["p0"].start()
    pair["p0"].wait_for(lambda: "Registering" in pair["p0"].log(), "linking")
    assert pair["p0"].process is not None
    pair["p0"].process.send_signal(signal.SIGINT)
    assert pair["p0"].exit_code() == 0
    pair["p0"].start()
    pair["p0"].wait_for(lambda: "server 0" in pair["p0"].launcher_log(), "a server of its own")
    pair["p0"].wait_for(lambda: "Registering" in pair["p0"].log(), "devices free again")


def test_several_decode_servers_share_the_devices(pair: StandinSet) -> None:
    decode = pair["d0"]
    decode.args |= {"--num-servers": "2", "--tp": "4", "--max-port-attempts": "20"}
    pair.start()
    pair.wait_ready()
    second = (Path(decode.args["--log-dir"]) / "server_1.log").read_text()
    assert "cluster id 12, devices [12, 13, 14, 15], dp rank 1 of 2" in second
    assert pair["p0"].metric("standin:links") == 2
    assert text_of(hand_over(pair["p0"], decode, PROMPT))


# Host tools


def tool(instance: Instance, path: str, *args: str) -> str:
    environment = {**os.environ, **instance.env}
    command = [str(STANDIN / "host" / path), *args]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    ).stdout


def test_hccn_tool_prints_the_formats_of_the_contract(pair: StandinSet) -> None:
    def ask(item: str) -> str:
        return tool(pair["p0"], "usr/bin/hccn_tool", "-i", "3", f"-{item}", "-g")

    assert ask("ip") == "ipaddr:192.168.0.103\nnetmask:255.255.255.0\n"
    assert ask("link") == "link status: UP\n"
    assert ask("net_health") == "net health status: Success\n"
    (pair["p0"].root / "etc/hccn.conf").write_text("link_3=DOWN\n")
    assert ask("ip") == "Get ipconf failed, because no ip was preset there!\n"
    assert ask("link") == "link status: DOWN\n"


def test_npu_smi_shows_who_holds_a_device(running: StandinSet) -> None:
    table = tool(running["p2"], "usr/local/bin/npu-smi", "info")
    rows = [[cell.split() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    dies = [row for row in rows if len(row) == 3 and row[1][:1] and row[1][0].startswith("0000:")]
    assert [die[0][1] for die in dies] == [str(i) for i in range(16)]
    assert {"".join(die[2][-2:]) for die in dies} == {"58210/65536"}  # p2 and d0 fill the host
    held = [row for row in rows if len(row) == 4 and row[1][:1] and row[1][0].isdecimal()]
    assert len(held) == 16
    assert all(Path(f"/proc/{row[1][0]}").exists() for row in held)


# Launcher


def test_the_launcher_builds_the_documented_command_line(pair: StandinSet, tmp_path: Path) -> None:
    recorder = tmp_path / "recorder" / "vllm"
    recorder.parent.mkdir()
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"; env | grep VLLM_DP | sort\n')
    recorder.chmod(0o755)
    args = ["--model-path", "/m", "--master-ip", "10.0.0.1", "--served-model-name", "qwen"]
    args += ["--num-servers", "1", "--num-dp", "1", "--tp", "8", "--log-dir", str(tmp_path)]
    args += ["--base-api-port", str(pair["p0"].api_port), "--extra-args", "--max-num-seqs 64"]
    args += ["--kv-transfer-config", '{"a": 1}', "--additional-config", "{}", "--enable-mtp"]
    environment = {"PATH": f"{recorder.parent}:{os.environ['PATH']}"}
    command = [PYTHON, "-S", str(LAUNCHER), *args, "--no-enable-prefix-caching"]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    port = pair["p0"].api_port
    assert (
        (tmp_path / "server_0.log").read_text().split()
        == f"""
        serve /m --trust-remote-code --gpu-memory-utilization 0.9 --block_size 128
        --tensor-parallel-size 8 --data-parallel-size 1 --data-parallel-size-local 1
        --data-parallel-address 10.0.0.1 --data-parallel-rpc-port 8000 --port {port}
        --served-model-name qwen --max-model-len 16384
        --speculative_config {{"method": "deepseek_mtp", "num_speculative_tokens": 1}}
        --kv-transfer-config {{"a": 1}} --max-num-seqs 64 --additional-config {{}}
        --no-enable-prefix-caching
        VLLM_DP_MASTER_IP=10.0.0.1 VLLM_DP_MASTER_PORT=8000 VLLM_DP_RANK=0
        VLLM_DP_RANK_LOCAL=0 VLLM_DP_SIZE=1
    """.split()
    )
