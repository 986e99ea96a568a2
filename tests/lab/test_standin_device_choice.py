"""Which devices the stand-in's workers take, and what they refuse. Real processes on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_deploy.lab.standin.processes import Instance, StandinSet, hand_over, standin_set

PROMPT = {"model": "qwen", "max_tokens": 20, "prompt": "how are you?"}
CHOICE = "refused [device-choice, contract 1.6]"


@pytest.fixture
def spanning(tmp_path: Path) -> Iterator[StandinSet]:
    """1P and a decode over two hosts: 2 servers of tp 4 on devices 0-7 of each; not started.

    As upstream starts it: SERVER_OFFSET in devices, no ASCEND_RT_VISIBLE_DEVICES for decode.
    """
    with standin_set(tmp_path, prefills=1, decodes=2) as instances:
        for index, name in enumerate(("d0", "d1")):
            decode = instances[name]
            decode.args |= {"--num-servers": "2", "--num-dp": "4", "--tp": "4"}
            decode.args |= {"--max-port-attempts": "20", "--server-offset": str(2 * index)}
            decode.env["SERVER_OFFSET"] = str(8 * index)
            del decode.env["ASCEND_RT_VISIBLE_DEVICES"]
        yield instances


def log_of(instance: Instance, server: int) -> str:
    return (Path(instance.args["--log-dir"]) / f"server_{server}.log").read_text()


def refusal(instance: Instance) -> str:
    """The rule's line in the log of the server that was refused."""
    instance.start()
    assert instance.exit_code() == 0
    logs = [file.read_text() for file in Path(instance.args["--log-dir"]).glob("server_*.log")]
    return next(line for log in logs for line in log.splitlines() if "refused [" in line)


def test_without_visible_devices_a_worker_counts_the_hosts_own(pair: StandinSet) -> None:
    pair["p0"].env["ASCEND_RT_VISIBLE_DEVICES"] = ""
    pair.start()
    pair.wait_ready()
    assert "devices [0, 1, 2, 3, 4, 5, 6, 7]," in pair["p0"].log()
    assert hand_over(pair["p0"], pair["d0"], PROMPT).status == 200


def test_without_visible_devices_an_instance_must_begin_at_device_0(pair: StandinSet) -> None:
    del pair["d0"].env["ASCEND_RT_VISIBLE_DEVICES"]
    line = refusal(pair["d0"])
    assert CHOICE in line
    assert "take devices [0, 1, 2, 3, 4, 5, 6, 7], the ranktable gives [8, 9," in line


def test_the_server_offset_moves_a_worker_back(pair: StandinSet) -> None:
    decode = pair["d0"]
    decode.env["SERVER_OFFSET"] = "4"
    line = refusal(decode)
    assert CHOICE in line
    assert "place -4 of [8, 9, 10, 11, 12, 13, 14, 15]" in line


def test_a_device_that_the_host_does_not_have_is_refused(pair: StandinSet) -> None:
    conf = pair["d0"].root / "etc/hccn.conf"
    conf.write_text("".join(conf.read_text().splitlines(keepends=True)[:12]))
    line = refusal(pair["d0"])
    assert CHOICE in line
    assert "device 12, the host has [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]" in line


def test_only_the_devices_in_use_have_their_addresses_checked(pair: StandinSet) -> None:
    # Two servers of tp 4; the second one's last device has another address on the host.
    decode = pair["d0"]
    decode.args |= {"--num-servers": "2", "--tp": "4", "--max-port-attempts": "20"}
    conf = decode.root / "etc/hccn.conf"
    conf.write_text(conf.read_text().replace("192.168.0.115", "192.168.9.9"))
    decode.start()
    assert decode.exit_code() == 0
    assert "refused" not in log_of(decode, 0)
    assert "refused [device-ip, contract 3.4]" in log_of(decode, 1)


def test_a_decode_over_hosts_finds_its_devices_by_the_server_offset(spanning: StandinSet) -> None:
    spanning.start()
    spanning.wait_ready()
    for name, server, cluster, devices in (
        ("d0", 0, 8, [0, 1, 2, 3]),
        ("d0", 1, 12, [4, 5, 6, 7]),
        ("d1", 0, 16, [0, 1, 2, 3]),
        ("d1", 1, 20, [4, 5, 6, 7]),
    ):
        expected = f"cluster id {cluster}, devices {devices}, "
        assert expected in log_of(spanning[name], server)
    assert spanning["p0"].metric("standin:links") == 4
    answers = [hand_over(spanning["p0"], spanning[name], PROMPT) for name in ("d0", "d1")]
    assert answers[0].body["choices"] == answers[1].body["choices"]


def test_without_its_server_offset_the_second_host_looks_past_its_devices(
    spanning: StandinSet,
) -> None:
    # The first server takes devices that exist, but are not its ranks'.
    del spanning["d1"].env["SERVER_OFFSET"]
    line = refusal(spanning["d1"])
    assert CHOICE in line
    assert "VLLM_DP_RANK_LOCAL=" in line


def test_visible_devices_on_the_second_host_fail_as_in_vllm(spanning: StandinSet) -> None:
    spanning["d1"].env["ASCEND_RT_VISIBLE_DEVICES"] = "0,1,2,3,4,5,6,7"
    line = refusal(spanning["d1"])
    assert CHOICE in line
    assert "Error setting ASCEND_RT_VISIBLE_DEVICES: local range: [" in line
    assert "base value: 0,1,2,3,4,5,6,7" in line


def test_visible_devices_on_the_first_host_work(spanning: StandinSet) -> None:
    spanning["d0"].env["ASCEND_RT_VISIBLE_DEVICES"] = "0,1,2,3,4,5,6,7"
    spanning.start()
    spanning.wait_ready()
    assert "devices [4, 5, 6, 7], dp rank 1 of 4" in log_of(spanning["d0"], 1)


def test_a_server_offset_that_is_no_number_is_refused(pair: StandinSet) -> None:
    pair["d0"].env["SERVER_OFFSET"] = "two"
    assert "refused [env-value, contract 4.1]" in refusal(pair["d0"])
