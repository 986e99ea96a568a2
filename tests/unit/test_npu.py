"""Who uses which NPU, from what `npu-smi info` prints (contract section 7.2)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pd_deploy.engines.omniinfer import npu_smi
from pd_deploy.errors import FactsError
from tests.unit.example import ROOT

STANDIN = ROOT / "lab/standin/host/usr/local/bin/npu-smi"
RULE = f"+{'-' * 27}+{'-' * 17}+{'-' * 53}+"
HEAD = [
    RULE,
    "| npu-smi 24.1.rc3.5               Version: 24.1.rc3.5                               |",
    "| NPU   Name                | Health        | Power(W)    Temp(C)  Hugepages-Usage(page)|",
    "| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)|",
    RULE.replace("-", "="),
]
PROCESSES = "| NPU     Chip    | Process id    | Process name    | Process memory(MB)     |"


def chip(npu_id: int, chip_ids: str, hbm: str = "3395 / 65536") -> list[str]:
    """Two rows of one chip; on A3 `chip_ids` is the chip and its physical id, on A2 the chip."""
    return [
        f"| {npu_id}     Ascend910           | OK            | -      37        0    / 0       |",
        f"| {chip_ids}     | 0000:9D:00.0  | 0           0    / 0          {hbm}         |",
        RULE,
    ]


def output(*chips: list[str], processes: tuple[str, ...] = ()) -> str:
    rows = [row for rows in chips for row in rows]
    return "\n".join([*HEAD, *rows, PROCESSES, RULE, *processes, RULE])


A3 = (chip(0, "0     0"), chip(0, "1     1"), chip(1, "0     2"), chip(1, "1     3"))
A2 = (chip(0, "0"), chip(1, "0"), chip(2, "0"))


def users(text: str, *devices: int) -> dict[int, str]:
    return npu_smi.parse_users(text, devices, host="a (10.0.0.1)")


def process(npu_id: int, chip_id: int, *, name: str = "python3.1") -> str:
    return f"| {npu_id}       {chip_id}         | 632268        | {name}       | 197        |"


@pytest.mark.parametrize("chips", [A3, A2], ids=["A3", "A2"])
def test_idle_devices_have_no_user(chips: tuple[list[str], ...]) -> None:
    free = ("| No running processes found in NPU 0     |",)
    assert users(output(*chips, processes=free), 0, 1, 2) == {}


def test_on_a3_a_device_is_the_physical_id() -> None:
    assert users(output(*A3, processes=(process(1, 0),)), 0, 1, 2, 3) == {
        2: "python3.1 (pid 632268)"
    }


def test_on_a2_a_device_is_the_npu() -> None:
    assert users(output(*A2, processes=(process(2, 0),)), 0, 1, 2) == {2: "python3.1 (pid 632268)"}


def test_only_devices_asked_for_are_told() -> None:
    text = output(*A3, processes=(process(0, 0), process(1, 1)))
    assert list(users(text, 3)) == [3]


@pytest.mark.parametrize(
    "row",
    [
        "| 1       0     | 632268        | python3.1   | 197             | 4711               |",
        "| 1       0     | 632268        | 4711        | python3.1       | 197                |",
    ],
    ids=["last", "before the name"],
)
def test_a_further_column_of_newer_drivers_hides_no_user(row: str) -> None:
    """25.x adds `Process id in container`; the process is found wherever that column is."""
    wide = output(*A3, processes=(row,)).replace("  |", f"{' ' * 30}|")
    found = users(wide, 0, 1, 2, 3)
    assert list(found) == [2]
    assert "(pid 632268)" in found[2]


@pytest.mark.parametrize("hbm", ["59356/ 65536", "59356/65536", "59356 /65536"])
def test_blanks_before_the_slash_may_be_missing(hbm: str) -> None:
    assert list(users(output(chip(0, "0     0", hbm), chip(0, "1     1")), 0, 1)) == [0]


@pytest.mark.parametrize(("used", "occupied"), [(3395, False), (5120, False), (5121, True)])
def test_memory_above_what_an_idle_device_uses_means_somebody(used: int, occupied: bool) -> None:
    found = users(output(chip(0, "0     0", f"{used} / 65536")), 0)
    assert found == ({0: f"somebody ({used} MB of its memory are in use)"} if occupied else {})


def test_a_process_says_more_than_the_memory_it_uses() -> None:
    text = output(chip(0, "0     0", "59356 / 65536"), processes=(process(0, 0),))
    assert users(text, 0) == {0: "python3.1 (pid 632268)"}


def test_ids_may_be_sparse() -> None:
    text = output(chip(5, "0"), chip(7, "0"), processes=(process(7, 0),))
    assert list(users(text, 5, 7)) == [7]


def test_process_of_a_chip_that_is_not_listed_is_passed_over() -> None:
    assert users(output(*A2, processes=(process(9, 0),)), 0, 1, 2) == {}


@pytest.mark.parametrize(
    ("text", "found"), [(output(chip(5, "0"), chip(7, "0")), "5, 7"), ("", "none")]
)
def test_devices_that_are_not_listed_are_an_error(text: str, found: str) -> None:
    expected = rf"list the devices 4, 6, found {found}"
    with pytest.raises(FactsError, match=expected) as caught:
        users(text, 4, 6)
    assert caught.value.host == "a (10.0.0.1)"


def test_the_stand_ins_own_output(tmp_path: Path) -> None:
    """A process that holds a device is found by its pid, used memory without one as somebody's."""
    prefix = f"units-npu-{os.getpid()}-"
    (tmp_path / "data/standin").mkdir(parents=True)
    (tmp_path / "data/standin/npu.json").write_text('{"hbm": {"5": 60000}}')
    env = os.environ | {"STANDIN_ROOT": str(tmp_path), "STANDIN_NPU_PREFIX": prefix}
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind(f"\0{prefix}3")
        done = subprocess.run(
            [sys.executable, STANDIN, "info"], env=env, capture_output=True, text=True, check=True
        )
    assert users(done.stdout, *range(16)) == {
        3: f"python3.1 (pid {os.getpid()})",
        5: "somebody (60000 MB of its memory are in use)",
    }


@pytest.mark.parametrize(
    ("chips", "health", "said"),
    [
        (A3, "OK", {}),
        (A3, "Warning", {}),
        *((A3, word, {1: f"npu-smi says {word}"}) for word in ("Alarm", "Critical", "UNKNOWN")),
        (A2, "Offline", {1: "npu-smi says Offline"}),
    ],
)
def test_devices_out_of_order_are_told(
    chips: tuple[list[str], ...], health: str, said: dict[int, str]
) -> None:
    """Each by its own row; devices that nobody asks for are not."""
    sick = chips[1][0].replace("OK", health)
    text = output(chips[0], [sick, *chips[1][1:]], *chips[2:], processes=(process(0, 0),))
    assert npu_smi.parse_faults(text, [0, 1]) == said
    assert npu_smi.parse_faults(text, [0, 2]) == {}


def test_a_network_port_that_is_down_is_told() -> None:
    ports = "".join(
        f"network port of device {device}\nlink status: {state}\n"
        for device, state in ((0, "UP"), (1, "DOWN"), (2, "-bash: hccn_tool: not found"))
    )
    told = npu_smi.parse_faults(f"{output(*A3)}\n{ports}", [0, 1, 2])
    assert told == {1: "its network port is DOWN"}
