"""Who uses which NPU, from what `npu-smi info` prints."""

import subprocess
import sys

import pytest

from pd_deploy import npu
from pd_deploy.errors import FactsError
from tests.unit import example

A3 = """\
| npu-smi 24.1.rc3.5               Version: 24.1.rc3.5                                           |
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 185.1       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3395 / 65536         |
+---------------------------+---------------+----------------------------------------------------+
| 0     Ascend910           | OK            | -           37                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          59356/ 65536         |
+===========================+===============+====================================================+
| 1     Ascend910           | OK            | 170.2       35                0    / 0             |
| 0     2                   | 0000:A1:00.0  | 0           0    / 0          3203 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 1       0                 | 632268        | python3.1                | 197                     |
| No running processes found in NPU 0                                                            |
"""
A2 = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 5     910B3               | OK            | 97.5        41                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3379 / 65536         |
| 6     910B3               | OK            | 97.5        41                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3379 / 65536         |
| NPU     Chip              | Process id | Process name | Process memory(MB) | Id in container |
| 6       0                 | 77         | vllm         | 100                | 12              |
"""


def test_processes_and_used_memory_both_occupy_a_device() -> None:
    found = npu.parse_users(A3, [0, 1, 2], host="a")
    assert found == {
        1: "somebody (59356 MB of its memory are in use)",
        2: "python3.1 (pid 632268)",
    }
    assert npu.parse_users(A3, [0], host="a") == {}


def test_one_chip_per_npu_and_sparse_ids_and_wider_tables() -> None:
    assert npu.parse_users(A2, [5, 6], host="a") == {6: "vllm (pid 77)"}


def test_a_device_that_is_not_listed_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(FactsError, match=r"the devices 3, 7, found 5, 6"):
        npu.parse_users(A2, [3, 5, 7], host="a")
    with pytest.raises(FactsError, match=r"found none"):
        npu.parse_users("dcmi module initialize failed", [0], host="a")


def test_the_stand_in_prints_what_is_understood() -> None:
    tool = example.ROOT / "lab/standin/host/usr/local/bin/npu-smi"
    printed = subprocess.run(
        [sys.executable, tool, "info"],
        env={"STANDIN_NPU_PREFIX": "nobody-npu-"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert npu.parse_users(printed, list(range(16)), host="a") == {}
