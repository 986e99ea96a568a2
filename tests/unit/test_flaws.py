"""What is wrong with hosts, by what they say: each fault is one problem, with what to do."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from pd_deploy.config.rule_names import ALLOWABLE, CHECKS
from pd_deploy.engines import ascend
from pd_deploy.engines.device_report import Device, DeviceReport, Lost, Ping
from pd_deploy.hosts import machine
from pd_deploy.hosts.batch import Printed
from pd_deploy.hosts.machine import Machine, ModelFiles
from pd_deploy.hosts.reach import Calls
from pd_deploy.planning import flaws
from pd_deploy.planning.flaws import Flaw, HostAnswers

GIB = 1 << 30
SOUND = Machine(memory=1000 * GIB, available=900 * GIB, huge_pages=0, shared_memory=0, mtu=1500)
FILES = ModelFiles({"config.json": 2, "model.safetensors": 9, "README.md": 5}, {"config.json": "x"})


def device(number: int, host: int) -> Device:
    address = f"192.168.{host}.{100 + number}"
    return Device("OK", "UP", "Success", "0", address, "255.255.255.0", "192.168.0.1", address)


def answers(host: int) -> HostAnswers:
    devices = {number: device(number, host) for number in range(4)}
    report = DeviceReport("24.1.rc3.5", "24.1.rc3.5", "7.5", devices=devices)
    name = "abc"[host]
    return HostAnswers(name, f"{name} (10.0.0.{host})", SOUND, report, FILES, (5.0, 5.2))


HOSTS = [answers(host) for host in range(3)]
Fault = Callable[[HostAnswers], HostAnswers]


def with_device(number: int, **changes: str) -> Fault:
    def fault(host: HostAnswers) -> HostAnswers:
        assert host.devices
        changed = {number: replace(host.devices.devices[number], **changes)}
        devices = replace(host.devices, devices={**host.devices.devices, **changed})
        return replace(host, devices=devices)

    return fault


def with_report(**changes: str) -> Fault:
    return lambda host: replace(host, devices=replace(host.devices or DeviceReport(), **changes))


def with_machine(**changes: object) -> Fault:
    return lambda host: replace(host, machine=replace(SOUND, **changes))  # type: ignore[arg-type]


def with_sizes(**changes: object) -> Fault:
    sizes = {name.replace("__", "."): size for name, size in changes.items()}
    kept = {**FILES.sizes, **sizes}
    model = replace(FILES, sizes={n: s for n, s in kept.items() if s is not None})  # type: ignore[misc]
    return lambda host: replace(host, model=model)


def found(hosts: list[HostAnswers]) -> list[Flaw]:
    of_each = [f for host in hosts for f in flaws.of_host(host, ascend, [0, 1, 2])]
    return [*of_each, *flaws.across(hosts), *flaws.gateways(hosts)]


def test_hosts_that_agree_have_no_flaws() -> None:
    assert found(HOSTS) == []


@pytest.mark.parametrize(
    ("fault", "check", "is_error", "words"),
    [
        (with_device(1, health="Alarm"), "device-health", True, "npu-smi says Alarm"),
        (with_device(1, health="Warning"), "device-health", False, "npu-smi says Warning"),
        (with_device(1, link="DOWN"), "device-link", True, "its network port is DOWN"),
        (with_device(1, net_health="Fault"), "device-network", False, "Fault on device 1"),
        (with_device(1, net_health="Socket fail"), "device-network", False, "Socket fail"),
        (with_device(1, tls="1"), "device-tls", True, "0 as on most, found the other on device 1"),
        (with_device(1, gateway=""), "device-gateway", False, "none for device 1"),
        (
            with_device(1, stored_address=""),
            "device-addresses", False, "192.168.2.101, in the file none on device 1",
        ),
        (
            with_report(driver="25.2.0", installed_driver="25.2.0"),
            "driver-version", False, "24.1.rc3.5, as on a (10.0.0.0), found 25.2.0",
        ),
        (with_report(installed_driver="25.2.0"), "driver-version", False, "25.2.0, to be loaded"),
        (with_report(firmware="7.1"), "firmware-version", False, "7.5, as on a"),
        (with_machine(mtu=9000), "mtu", False, "an MTU of 1500, as on a (10.0.0.0), found 9000"),
        (with_machine(available=9 * GIB), "memory", False, "9.0 GiB of 1000.0 GiB"),
        (with_machine(huge_pages=600 * GIB), "huge-pages", False, "600.0 GiB of 1000.0 GiB"),
        (with_machine(shared_memory=200 * GIB), "shared-memory", False, "found 200.0 GiB"),
        (
            with_machine(governor=("powersave", "cppc_cpufreq")),
            "cpu-governor", False, "powersave (cppc_cpufreq)",
        ),
        (
            with_machine(unread=("`ip` printed nothing",)),
            "not-read", False, "found that `ip` printed nothing",
        ),
        (lambda host: replace(host, clock=(-90.0, -89.8)), "clock", False, "95 s behind them"),
        (lambda host: replace(host, clock=(95.0, 95.2)), "clock", False, "90 s ahead of them"),
        (with_sizes(config__json=None), "model-files", True, "found no config.json"),
        (with_sizes(model__safetensors=8), "model-files", True, "8 bytes instead of 9"),
        (with_sizes(NOTES=1), "model-files", False, "found NOTES, which is not there"),
        (
            lambda host: replace(host, model=replace(FILES, digests={"config.json": "y"})),
            "model-files", True, "config.json with another content",
        ),
    ],
)  # fmt: skip
def test_a_fault_of_a_host_is_one_flaw(
    fault: Fault, check: str, is_error: bool, words: str
) -> None:
    (flaw,) = found([*HOSTS[:2], fault(HOSTS[2])])
    assert (flaw.check, flaw.host, flaw.is_error) == (check, "c (10.0.0.2)", is_error)
    assert words in flaw.message
    assert flaw.hint
    assert check in CHECKS
    (allowed,) = flaws.allowed([flaw], [check])
    assert not allowed.is_error


@pytest.mark.parametrize(
    "fault",
    [
        with_device(3, health="Alarm"),  # no server needs it
        with_device(1, net_health="Init"),  # no address is probed
        with_device(1, link="", tls=""),  # it is told as not read
        with_machine(governor=("powersave", "intel_pstate")),
        with_machine(governor=("performance", "cppc_cpufreq")),
        with_machine(memory=None, available=None, mtu=None),
        lambda host: replace(host, clock=(0.0, 40.0)),  # it was slow to answer
        lambda host: replace(host, model=None),  # only the proxy runs there
        lambda host: replace(host, model=ModelFiles(FILES.sizes, {})),  # too slow to read them
    ],
)
def test_what_is_no_fault(fault: Fault) -> None:
    assert found([*HOSTS[:2], fault(HOSTS[2])]) == []


def test_devices_of_one_network_need_no_gateway() -> None:
    """Nor do those that have a network for each number over all hosts."""

    def at(address: Callable[[int, int], str]) -> list[HostAnswers]:
        hosts = []
        for index, host in enumerate(HOSTS):
            changed = host
            for number in range(4):
                own = address(index, number)
                changes = {"address": own, "stored_address": own, "gateway": ""}
                changed = with_device(number, **changes)(changed)
            hosts.append(changed)
        return hosts

    assert found(at(lambda host, number: f"10.0.0.{10 * host + number}")) == []
    assert found(at(lambda host, number: f"10.0.{number}.{host}")) == []
    assert len(found(at(lambda host, number: f"10.0.{host}.{number}"))) == len(HOSTS)


def test_parts_of_large_files_are_compared() -> None:
    parts = [{"w1": "1", "w2": "2"}, {"w1": "1", "w2": "2"}, {"w1": "0", "w2": "2"}]
    hosts = [replace(host, parts=p) for host, p in zip(HOSTS, parts, strict=True)]
    (flaw,) = found(hosts)
    assert flaw.is_error
    assert flaw.message.endswith("on a (10.0.0.0), found another in w1")


def ways(results: Mapping[str, str], listened: frozenset[int] = frozenset({9000})) -> list[Flaw]:
    where = {"a": "a (10.0.0.0)", "b": "b (10.0.0.1)"}
    calls = {"a": [("10.0.0.1", 9000)], "b": [("10.0.0.0", 9000)]}
    said = {"a": Calls(listened, results), "b": Calls(listened, {})}
    return flaws.unreached(where, calls, said, {"10.0.0.0": "a", "10.0.0.1": "b"})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ETIMEDOUT", "nothing comes back"),
        ("EHOSTUNREACH", "no route, or a firewall rejects it"),
        ("ECONNREFUSED", "something listens there"),
        ("EPERM", "found that EPERM"),
    ],
)
def test_a_closed_way_is_told_with_its_direction(error: str, words: str) -> None:
    (flaw,) = ways({"10.0.0.1:9000": error})
    assert flaw.is_error
    assert flaw.host == "a (10.0.0.0)"
    assert "to reach b (10.0.0.1) at its ports 9000" in flaw.message
    assert words in flaw.message


def test_a_host_that_refuses_where_nothing_listens_is_reached() -> None:
    assert ways({"10.0.0.1:9000": "ECONNREFUSED"}, listened=frozenset()) == []
    assert ways({}) == []


def test_a_trial_that_nobody_understands_is_a_warning() -> None:
    said = {"a": Calls(results={}, unread="no python3")}
    (flaw,) = flaws.unreached({"a": "a (10.0.0.0)"}, {"a": []}, said, {})
    assert not flaw.is_error
    assert "'no python3'" in flaw.message


@pytest.mark.parametrize(
    ("lost", "is_error", "words"),
    [
        (Lost(Ping(0, "x", "b"), 3, 0), True, "0 → x 0 of 3 packets came back"),
        (Lost(Ping(0, "x", "b"), 3, 2), False, "2 of 3 packets"),
        (Lost(Ping(0, "x", "b"), printed="'busy'"), False, "'busy'"),
        (Lost(Ping(0, "x", "b", within=True), 3, 0), False, "by the super-node"),
    ],
)
def test_pings_that_are_lost(lost: Lost, is_error: bool, words: str) -> None:
    (flaw,) = flaws.lost_pings("a (10.0.0.0)", [lost])
    assert flaw.is_error == is_error
    assert words in flaw.message
    assert f"-{'hccs_' * lost.ping.within}ping -g address x" in flaw.hint


def test_what_a_machine_prints_is_read() -> None:
    printed = {
        "date +%s.%N": "1764268000.123456789\n",
        "date -u +%s.%N": "1764268002.5\n",
        "cat /proc/meminfo": "MemTotal:  1024 kB\nMemAvailable: 512 kB\nHugePages_Total: 2\n"
        "Hugepagesize: 2048 kB\n",
        "df -P -k /dev/shm": "Filesystem 1024-blocks Used Available Capacity Mounted on\n"
        "tmpfs 528230224 12 528230212 1% /dev/shm\n",
        " ".join(machine.GOVERNOR): "cppc_cpufreq\nondemand\n",
        "ip -j -4 addr": '[{"ifname": "lo"}, {"mtu": 9000, "addr_info": [{"local": "10.0.0.1"}]}]',
    }
    batch = {command: Printed(text) for command, text in printed.items()}
    assert machine.parse(batch, "10.0.0.1") == Machine(
        1764268000.123456789, 1764268002.5, 1 << 20, 1 << 19, 4 << 20, 12 << 10, 9000,
        ("ondemand", "cppc_cpufreq"),
    )  # fmt: skip
    assert len(machine.parse({}, "10.0.0.1").unread) == 4


def test_half_a_list_of_the_models_files_is_none() -> None:
    """It would differ from those of all other hosts."""
    listing, hashing = (shlex.join(argv) for argv in machine.model_commands("/m"))
    hashed = Printed(f"{'0' * 64}  /m/config.json\n")
    whole = {listing: Printed("2 config.json\nfind: x: denied\n", 1), hashing: hashed}
    assert machine.parse_model(whole, "/m") == ModelFiles(
        {"config.json": 2}, {"config.json": "0" * 64}, ("find: x: denied",)
    )
    cut = machine.parse_model({listing: Printed("2 config.json\n", None)}, "/m")
    assert cut.sizes == {}
    assert len(cut.unread) == 1


def test_only_checks_of_errors_can_be_allowed() -> None:
    assert set(ALLOWABLE) < set(CHECKS)
