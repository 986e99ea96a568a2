"""What is wrong with hosts, by what they say of themselves, alone and compared. Pure.

An error would make a service fail, or fail its users, so it stops a run before anything else is
stopped. A warning is what may be meant so, what only costs time, and what could not be checked.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface
from typing import TypeVar

from pd_deploy.engines.device_report import DeviceReport, DeviceTools, Lost
from pd_deploy.hosts.machine import Machine, ModelFiles
from pd_deploy.hosts.reach import Calls

T = TypeVar("T")
D = TypeVar("D")

GIB = 1 << 30
CLOCK_S = 2.0
"""Clocks may differ by so much: what logs and metrics of several hosts say is compared by them."""
SHOWN = 3
# Files of a model that engines read: weights, configuration, tokenizer, code.
_READ = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf"),
    *(".json", ".model", ".tiktoken", ".txt", ".jinja", ".py"),
)


@dataclass(frozen=True)
class Flaw:
    """Something that is wrong, or may be.

    Attributes:
        check: what was checked; see `CHECKS`.
        host: where, for people; "" for what is nowhere in particular.
        message: what was expected, and what was found.
        hint: what to do.
    """

    check: str
    host: str
    message: str
    hint: str
    is_error: bool = True


@dataclass(frozen=True)
class HostAnswers:
    """What a host said of itself.

    Attributes:
        name: in the file.
        where: for people.
        devices: None if its engine has no tools for them.
        model: None if nothing there needs it.
        clock: by how many seconds its clock is ahead of the controller's, at least and at most;
            None if it did not say.
        parts: digests of parts of the model's files, or of all, by path.
        listening: the ports where something listens.
    """

    name: str
    where: str
    machine: Machine = field(default_factory=Machine)
    devices: DeviceReport | None = None
    model: ModelFiles | None = None
    clock: tuple[float, float] | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    listening: frozenset[int] = frozenset()


def allowed(flaws: Iterable[Flaw], allow: Sequence[str]) -> list[Flaw]:
    """Make warnings of the errors that the file allows."""
    return [replace(f, is_error=False) if f.check in allow else f for f in flaws]


def of_host(answers: HostAnswers, tools: DeviceTools | None, needed: Sequence[int]) -> list[Flaw]:
    """List what is wrong with a host alone.

    Args:
        needed: the devices that are going to be used.
    """
    flaws = [*_of_machine(answers)]
    if tools and answers.devices:
        flaws += _of_devices(answers, answers.devices, tools, needed)
    return flaws


def across(hosts: Sequence[HostAnswers]) -> list[Flaw]:
    """List what differs between hosts and should not. The majority counts as right, because
    somebody has to look at the fewest hosts then."""
    reports = {h.where: h.devices for h in hosts if h.devices}
    drivers = {where: report.driver for where, report in reports.items() if report.driver}
    firmware = {where: report.firmware for where, report in reports.items() if report.firmware}
    mtus = {h.where: h.machine.mtu for h in hosts if h.machine.mtu}
    return [
        *_differing("driver-version", "driver {}", drivers, "install the same driver everywhere"),
        *_differing(
            "firmware-version", "firmware {}", firmware, "install the same firmware everywhere"
        ),
        *_differing(
            "mtu", "an MTU of {}", mtus,
            "set the same one on all interfaces and switches: large packets may be lost on the way",
        ),
        *_tls(reports),
        *_clocks(hosts),
        *_model(hosts),
        *_parts(hosts),
    ]  # fmt: skip


def unreached(
    where: Mapping[str, str], calls: Mapping[str, Sequence[tuple[str, int]]],
    answers: Mapping[str, Calls], host_of: Mapping[str, str],
) -> list[Flaw]:  # fmt: skip
    """List the ways between hosts that are closed.

    Args:
        where: by host, its name for people.
        calls: by host, the addresses and ports that it called.
        answers: by host, what came of it.
        host_of: by address, the host.
    """
    flaws = [
        Flaw(
            "ports-reachable", where[name], f"expected to try the ways to other hosts, found that "
            f"the trial printed {said.unread!r}",
            "install python3 there, or try them by hand (`nc -vz HOST PORT`)", is_error=False,
        )
        for name, said in answers.items() if said.unread
    ]  # fmt: skip
    for name, called in calls.items():
        closed: dict[tuple[str, str], list[int]] = {}
        for address, port in called:
            error = answers[name].results.get(f"{address}:{port}", "")
            other = host_of[address]
            # A host that refuses can be reached, unless somebody listens there who was not asked.
            if error and (error != "ECONNREFUSED" or port in answers[other].listened):
                closed.setdefault((other, error), []).append(port)
        flaws += [
            Flaw(
                "ports-reachable", where[name],
                f"expected to reach {where[other]} at its ports {', '.join(map(str, ports))}, "
                f"found that {_WHY.get(error, error)}",
                f"open them from {name} to {other}, in the firewalls of both and between them",
            )
            for (other, error), ports in closed.items()
        ]  # fmt: skip
    return flaws


_WHY = {
    "ETIMEDOUT": "nothing comes back (a firewall that drops, or no route)",
    "EHOSTUNREACH": "there is no route, or a firewall rejects it",
    "ENETUNREACH": "there is no route",
    "ECONNREFUSED": "a firewall rejects it: something listens there",
}


def lost_pings(where: str, lost: Sequence[Lost]) -> list[Flaw]:
    """List the devices of a host that don't reach devices of others."""
    flaws = []
    for is_within in (False, True):
        by_result: dict[tuple[str, str], list[Lost]] = {}
        for one in lost:
            if one.ping.within == is_within:
                result = one.printed or f"{one.received} of {one.sent} packets came back"
                by_result.setdefault((one.ping.host, result), []).append(one)
        for (other, result), some in by_result.items():
            pings = [f"{one.ping.device} → {one.ping.address}" for one in some]
            more = f" and {len(pings) - SHOWN} more" if pings[SHOWN:] else ""
            flaws.append(
                Flaw(
                    "device-ping", where,
                    f"expected devices to reach those of {other}"
                    f"{' by the super-node' if is_within else ''}, "
                    f"found that of {', '.join(pings[:SHOWN])}{more} {result}",
                    "check cables, addresses, gateways and switches "
                    f"(`hccn_tool -i {some[0].ping.device} -{'hccs_' * is_within}ping -g address "
                    f"{some[0].ping.address}`)",
                    # Hosts of different super-nodes don't reach each other by it.
                    is_error=not is_within and not some[0].printed and some[0].received == 0,
                )
            )  # fmt: skip
    return flaws


def _of_machine(answers: HostAnswers) -> Iterator[Flaw]:
    machine, where = answers.machine, answers.where
    memory = machine.memory or 0
    for told in (*machine.unread, *(answers.model.unread if answers.model else ())):
        yield _unread(where, told)
    if memory and machine.available is not None and machine.available < memory / 10:
        yield Flaw(
            "memory", where,
            f"expected a tenth of the memory to be free, found {gib(machine.available)} "
            f"of {gib(memory)}", "see what uses it (`ps aux --sort -rss`)", is_error=False,
        )  # fmt: skip
    if memory and (machine.huge_pages or 0) > memory / 2:
        yield Flaw(
            "huge-pages", where,
            f"expected at most half of the memory to be kept for huge pages, found "
            f"{gib(machine.huge_pages or 0)} of {gib(memory)}",
            "lower vm.nr_hugepages: servers can't use that memory", is_error=False,
        )  # fmt: skip
    if memory and (machine.shared_memory or 0) > memory / 10:
        yield Flaw(
            "shared-memory", where,
            "expected little in /dev/shm, which is memory, "
            f"found {gib(machine.shared_memory or 0)}",
            "remove what ended processes have left there", is_error=False,
        )  # fmt: skip
    # These drivers choose a frequency by load under the name `powersave`.
    governor, driver = machine.governor or ("", "")
    if governor == "powersave" and driver not in ("intel_pstate", "amd-pstate-epp"):
        yield Flaw(
            "cpu-governor", where,
            "expected processors that go faster under load, "
            f"found the governor powersave ({driver})",
            "`cpupower frequency-set -g performance`", is_error=False,
        )  # fmt: skip


def _of_devices(
    answers: HostAnswers, report: DeviceReport, tools: DeviceTools, needed: Sequence[int]
) -> Iterator[Flaw]:
    where = answers.where
    for told in report.unread:
        yield _unread(where, told)
    for number in needed:
        device = report.devices.get(number)
        if device is None:
            continue
        said = [] if device.health in ("", *tools.FIT) else [f"npu-smi says {device.health}"]
        works = device.health in tools.WORKING
        if device.link == "DOWN":
            said.append("its network port is DOWN")
            works = False
        if said:
            check = "device-health" if device.health not in ("", *tools.FIT) else "device-link"
            yield Flaw(
                check, where,
                f"expected device {number} to be healthy, found that {', '.join(said)}",
                "check its driver and cable, or use other devices", is_error=not works,
            )  # fmt: skip
    yield from _of_networks(where, report)
    loaded, installed = report.driver.casefold(), report.installed_driver.casefold()
    if loaded and installed and loaded != installed:
        yield Flaw(
            "driver-version", where,
            f"expected the installed driver, {report.installed_driver}, to be loaded, "
            f"found {report.driver}", "start the host again", is_error=False,
        )  # fmt: skip


def _of_networks(where: str, report: DeviceReport) -> Iterator[Flaw]:
    devices = report.devices.items()
    sick = {n: d.net_health for n, d in devices if d.net_health not in ("", "Success", "Init")}
    if sick:
        yield Flaw(
            "device-network", where,
            f"expected the devices' networks to be healthy, found {_listed(sick)}",
            "`hccn_tool -i N -netdetect -g` says which address is probed", is_error=False,
        )  # fmt: skip
    moved = {
        n: f"{d.address}, in the file {d.stored_address or 'none'}"
        for n, d in devices
        if d.address and d.address != d.stored_address
    }
    if moved:
        yield Flaw(
            "device-addresses", where,
            f"expected the addresses of /etc/hccn.conf, found {_listed(moved)}",
            "write the addresses there: they are set from that file when the host starts",
            is_error=False,
        )  # fmt: skip


def gateways(hosts: Sequence[HostAnswers]) -> list[Flaw]:
    """List devices that lack a gateway, although there are devices in other networks."""
    networks = {
        (host.where, n): IPv4Interface(f"{d.address}/{d.netmask or '255.255.255.0'}").network
        for host in hosts if host.devices
        for n, d in host.devices.devices.items() if d.address
    }  # fmt: skip
    if len(set(networks.values())) < 2:
        return []
    # Devices may have a network for each of their numbers, over all hosts.
    of_number: dict[int, set[object]] = {}
    for (_, n), network in networks.items():
        of_number.setdefault(n, set()).add(network)
    flaws = []
    for host in hosts:
        lacking = [
            n for n, d in (host.devices.devices if host.devices else {}).items()
            if d.address and not d.gateway and len(of_number[n]) > 1
        ]  # fmt: skip
        if lacking:
            flaws.append(
                Flaw(
                    "device-gateway", host.where,
                    "expected a gateway, because devices of other hosts are in other networks; "
                    f"found none for device {', '.join(map(str, lacking))}",
                    "`hccn_tool -i N -gateway -s gateway ADDRESS`", is_error=False,
                )
            )  # fmt: skip
    return flaws


def _tls(reports: Mapping[str, DeviceReport]) -> Iterator[Flaw]:
    switches = [d.tls for r in reports.values() for d in r.devices.values() if d.tls]
    usual = Counter(switches).most_common(1)[0][0] if switches else ""
    for where, report in reports.items():
        others = [n for n, d in report.devices.items() if d.tls not in ("", usual)]
        if others:
            yield Flaw(
                "device-tls", where,
                f"expected the TLS switch of all devices to be the same, {usual} as on most, found "
                f"the other on device {', '.join(map(str, others))}",
                f"`hccn_tool -i N -tls -s enable {usual}`: devices that differ can't link",
            )  # fmt: skip


def _clocks(hosts: Sequence[HostAnswers]) -> Iterator[Flaw]:
    known = {h.where: h.clock for h in hosts if h.clock}
    if not known:
        return
    # The clock in the middle counts as right.
    middle = sorted(known.values(), key=sum)[(len(known) - 1) // 2]
    for where, (earliest, latest) in known.items():
        apart = max(earliest - middle[1], middle[0] - latest)
        if apart > CLOCK_S:
            way = "ahead of" if earliest > middle[1] else "behind"
            yield Flaw(
                "clock", where,
                f"expected its clock to be as the others', found it {apart:.0f} s {way} them",
                "start its time service (`chronyc tracking`, `timedatectl`)", is_error=False,
            )  # fmt: skip


def _model(hosts: Sequence[HostAnswers]) -> Iterator[Flaw]:
    models = {h.where: h.model for h in hosts if h.model and h.model.sizes}
    for where, other, differences in _compared(models, _state_of, _differences):
        serious = [text for path, text in differences if path.endswith(_READ)]
        texts = serious or [text for _, text in differences]
        more = f" and {len(texts) - SHOWN} more" if texts[SHOWN:] else ""
        yield Flaw(
            "model-files", where,
            f"expected the model's files to be as on {other}, "
            f"found {', '.join(texts[:SHOWN])}{more}",
            "copy the model again to the host that lacks them, or to this one",
            is_error=bool(serious),
        )  # fmt: skip


def _parts(hosts: Sequence[HostAnswers]) -> Iterator[Flaw]:
    parts = {h.where: h.parts for h in hosts if h.parts}

    def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str]]:
        common = one.keys() & other.keys()
        return [(p, p) for p in sorted(common) if one[p] != other[p]]

    for where, other, paths in _compared(parts, lambda p: tuple(sorted(p.items())), differences):
        shown = ", ".join(path for path, _ in paths[:SHOWN])
        more = f" and {len(paths) - SHOWN} more" if paths[SHOWN:] else ""
        yield Flaw(
            "model-files", where,
            f"expected the model's files to have the content that they have on {other}, found "
            f"another in {shown}{more}", "copy the model again",
        )  # fmt: skip


def _state_of(model: ModelFiles) -> Hashable:
    return tuple(sorted(model.sizes.items())), tuple(sorted(model.digests.items()))


def _differences(one: ModelFiles, other: ModelFiles) -> list[tuple[str, str]]:
    """List the files in which one model differs from another, each with how."""
    found = []
    for path in sorted(one.sizes.keys() | other.sizes.keys()):
        here, there = one.sizes.get(path), other.sizes.get(path)
        if here is None:
            found.append((path, f"no {path}"))
        elif there is None:
            found.append((path, f"{path}, which is not there"))
        elif here != there:
            found.append((path, f"{path} with {here} bytes instead of {there}"))
        # A host may have been too slow to read all.
        elif one.digests.get(path) != other.digests.get(path) and (
            path in one.digests and path in other.digests
        ):
            found.append((path, f"{path} with another content"))
    return found


def _compared(
    values: Mapping[str, T],
    key: Callable[[T], Hashable],
    differences: Callable[[T, T], list[D]],
) -> Iterator[tuple[str, str, list[D]]]:
    """Compare each value with the one that most have; yield who differs, from whom, and how."""
    counts = Counter(key(value) for value in values.values())
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    other = next(where for where, value in values.items() if key(value) == usual)
    for where, value in values.items():
        if key(value) != usual and (found := differences(value, values[other])):
            yield where, other, found


def _differing(check: str, form: str, values: Mapping[str, Hashable], hint: str) -> Iterator[Flaw]:
    for where, other, found in _compared(values, lambda v: v, lambda one, two: [(one, two)]):
        here, usual = found[0]
        yield Flaw(
            check, where,
            f"expected {form.format(usual)}, as on {other}, found {here}", hint, is_error=False,
        )  # fmt: skip


def _unread(where: str, told: str) -> Flaw:
    return Flaw(
        "not-read", where, f"expected an answer that can be read, found that {told}",
        "run it there; what it says was not checked", is_error=False,
    )  # fmt: skip


def _listed(values: Mapping[int, str]) -> str:
    """Write values by device, the same of several devices once."""
    of_value: dict[str, list[str]] = {}
    for device, value in values.items():
        of_value.setdefault(value, []).append(str(device))
    texts = [f"{value} on device {', '.join(of)}" for value, of in of_value.items()]
    more = f" and {len(texts) - SHOWN} more" if texts[SHOWN:] else ""
    return "; ".join(texts[:SHOWN]) + more


def gib(size: int) -> str:
    """Write a size, given in bytes."""
    return f"{size / GIB:.1f} GiB"
