"""What npu-smi and hccn_tool print, as people have shown it, and how it is read."""

import shlex
from collections.abc import Mapping

import pytest

from pd_deploy.engines import ascend
from pd_deploy.engines.device_report import Device, DeviceReport, Ping
from pd_deploy.hosts.batch import Printed

WIDE = f"+{'=' * 27}+{'=' * 15}+{'=' * 52}+"
A2_23 = f"""\
+------------------------------------------------------------------------------------------------+
| npu-smi 23.0.rc3                 Version: 23.0.rc3                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
{WIDE}
| 0     910B4               | OK            | 82.6        47                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3127 / 32768         |
{WIDE}
| 1     910B4               | Alarm         | 81.6        50                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3127 / 32768         |
{WIDE}
"""
# The oldest has a column for the device, and no numbers in it on some machines.
A2_23_RC1 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 23.0.rc1                       Version: 23.0.rc1                                       |
+-------------------+-----------------+----------------------------------------------------------+
| NPU     Name      | Health          | Power(W)    Temp(C)           Hugepages-Usage(page)      |
| Chip    Device    | Bus-Id          | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)              |
+===================+=================+==========================================================+
| 0       910B2C    | OK              | 66.8        44                0    / 0                   |
| 0       0         | 0000:C1:00.0    | 0           2429 / 15077      3632 / 65536               |
+===================+=================+==========================================================+
| 1       910B3     | Alarm           | 67.5        42                0    / 0                   |
| 0       NA        | 0000:C2:00.0    | 60          5042  / 65536                                |
+===================+=================+==========================================================+
"""
A3_25 = f"""\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.3.rc1                 Version: 25.3.rc1                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
{WIDE}
| 0     Ascend910           | OK            | 166.6       37                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3150 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | Alarm         | -           36                0    / 0             |
| 1     1                   | 0000:9E:00.0  | 0           0    / 0          2876 / 65536         |
{WIDE}
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
{WIDE}
| No running processes found in NPU 0                                                            |
{WIDE}
"""
TLS_23 = """\
dev_id:0, tls switch[0](0:disable, 1:enable), tls preconfigured[1](0:non-preset, 1:preset), \
tls alarm time threshold[60]days
"""
TLS_25 = """\
dev_id:0, tls switch[1](0:disable, 1:enable), tls alarm time threshold[60]days
dev_id:0, [pub cert] info:
         issuer[/C=CN/ST=GD/O=HUAWEI/OU=2012/CN=2_1thCA]
         start_time[Wed Feb 19 03:19:21 2020 GMT]
"""
LOST = "recv time out seq=0\n3 packets transmitted, {} received, {}% packet loss"
SUPER_NODE = """\
device 0 PING 172.16.1.2

This pkt ping success!
recv seq 0, time = 8.123us, L1 plane check result = 0x0

{sent} packets transmitted, {received} received, {loss}% packets loss
max time 8.123us
"""
GATEWAY = "default gateway:11.12.165.1, Iface:eth0\n"
ALONE = (0,)


def asked(printed: Mapping[str, str]) -> dict[str, Printed]:
    """By command, without the words that all of a device have in common."""
    return {
        f"hccn_tool -i 0 -{name} -g" if " " not in name else name: Printed(text)
        for name, text in printed.items()
    }


def report(**printed: str) -> DeviceReport:
    base = {
        "link": "link status: UP\n",
        "tls": TLS_23,
        "net_health": "net health status: Success\n",
    }
    base |= {"ip": "ipaddr:11.12.165.80\nnetmask:255.255.255.0\n", "gateway": GATEWAY}
    batch = asked({"npu-smi info": A2_23, **base, **printed})
    return ascend.parse(batch, ALONE, full=True)


@pytest.mark.parametrize(
    ("table", "driver", "super_node"),
    [
        (A2_23, "23.0.rc3", False),
        (A2_23_RC1, "23.0.rc1", False),
        (A3_25, "25.3.rc1", True),
        (A2_23.replace("23.0.rc3", "25.0.rc1.b010"), "25.0.rc1.b010", False),
        (A2_23.replace("|", "| ", 1).replace("3127 /", "3127/"), "23.0.rc3", False),
    ],
)
def test_the_table_of_any_driver(table: str, driver: str, super_node: bool) -> None:
    batch = asked({"npu-smi info": table})
    read = ascend.parse(batch, [0, 1, 2], full=False)
    assert (read.driver, read.has_super_node) == (driver, super_node)
    assert {d: of.health for d, of in read.devices.items()} == {0: "OK", 1: "Alarm", 2: ""}


def test_versions_are_those_of_the_files() -> None:
    batch = asked(
        {
            shlex.join(ascend.DRIVER): "Version=24.1.rc3.5\nascendhal_version=7.35.23\n",
            shlex.join(ascend.FIRMWARE): "cat: …: No such file or directory",
        }
    )
    read = ascend.parse(batch, [0], full=False)
    assert (read.installed_driver, read.firmware) == ("24.1.rc3.5", "")


@pytest.mark.parametrize(("tls", "switch"), [(TLS_23, "0"), (TLS_25, "1")])
def test_what_a_device_says_of_its_network(tls: str, switch: str) -> None:
    read = report(tls=tls)
    assert read.devices[0] == Device(
        health="OK", link="UP", net_health="Success", tls=switch,
        address="11.12.165.80", netmask="255.255.255.0", gateway="11.12.165.1",
    )  # fmt: skip
    assert read.unread == ()


@pytest.mark.parametrize(
    ("item", "text", "value"),
    [
        ("link", "link status: DOWN\n", "DOWN"),
        ("net_health", "net health status: Init\n", "Init"),
        ("net_health", "net health status: Socket fail\n", "Socket fail"),
        ("gateway", "default gateway:0.0.0.0, Iface:eth0\n", ""),
        ("gateway", "Get default gateway failed.\n", ""),
    ],
)
def test_what_is_not_as_usual(item: str, text: str, value: str) -> None:
    read = report(**{item: text})
    assert getattr(read.devices[0], item) == value
    assert read.unread == ()


def test_what_nobody_understands_is_told_once_for_all_devices() -> None:
    missing = "sh: 1: hccn_tool: not found\n"
    devices = range(16)
    batch = {shlex.join(ascend.query(d, "link")): Printed(missing, 127) for d in devices}
    batch |= {shlex.join(ascend.query(d, "tls")): Printed("", None) for d in devices}
    batch["npu-smi info"] = Printed("dcmi model initialized failed, because the device is used.", 1)
    listed = "0, 1, 2, 3, 4, 5, 6, 7 …"
    assert ascend.parse(batch, devices, full=False).unread == (
        "`npu-smi info` printed 'dcmi model initialized failed, because the device is used.'",
        f"`hccn_tool -i N -link -g` printed 'sh: 1: hccn_tool: not found' for device {listed}",
        f"`hccn_tool -i N -tls -g` printed nothing in time for device {listed}",
    )


@pytest.mark.parametrize(
    ("text", "within", "lost"),
    [
        ("3 packets transmitted, 3 received, 0.00% packet loss", False, None),
        (LOST.format(2, "33.33"), False, (3, 2)),
        (LOST.format(0, "100.00"), False, (3, 0)),
        (SUPER_NODE.format(sent=3, received=3, loss="0.00"), True, None),
        (SUPER_NODE.format(sent=3, received=0, loss="100.00"), True, (3, 0)),
    ],
)
def test_pings_are_judged_by_what_came_back(
    text: str, within: bool, lost: tuple[int, int] | None
) -> None:
    ping = Ping(0, "11.12.165.20", "b", within)
    (lane,) = ascend.ping_lanes([ping])
    found = ascend.lost({shlex.join(lane[0]): Printed(text, 1)}, [ping])
    assert [(one.sent, one.received) for one in found] == ([] if lost is None else [lost])


def test_a_ping_that_cannot_be_read_says_what_was_printed() -> None:
    ping = Ping(0, "172.16.1.2", "b", within=True)
    (lane,) = ascend.ping_lanes([ping])
    said = Printed("This device does not support this function.", 1)
    (found,) = ascend.lost({shlex.join(lane[0]): said}, [ping])
    assert found.printed == "'This device does not support this function.'"


def test_the_calls_of_one_device_follow_each_other() -> None:
    """So that at most one runs for each device of a host."""
    pings = [Ping(d, f"10.0.0.{n}", "b") for n in (1, 2) for d in (0, 1)]
    assert [[argv[2] for argv in lane] for lane in ascend.ping_lanes(pings)] == [
        ["0", "0"],
        ["1", "1"],
    ]
