"""What hosts said of themselves in a preflight, for people: also where nothing is wrong. Pure."""

from collections import Counter
from collections.abc import Iterable

from pd_deploy.engines.device_report import DeviceReport
from pd_deploy.hosts.machine import Machine
from pd_deploy.planning.flaws import HostAnswers, gib


def facts_of(answers: HostAnswers) -> dict[str, str]:
    """Return what a host said, by name; what it did not tell is left out."""
    facts = _of_devices(answers.devices) if answers.devices else {}
    facts |= _of_machine(answers.machine)
    if answers.clock:
        facts["clock"] = f"{sum(answers.clock) / 2:+.1f} s from here"
    if answers.model and answers.model.sizes:
        sizes = answers.model.sizes
        facts["model"] = f"{len(sizes)} files of {gib(sum(sizes.values()))}"
    return facts


def _of_devices(report: DeviceReport) -> dict[str, str]:
    devices = report.devices.values()
    facts = {
        "devices": _counted(device.health for device in devices),
        "links": _counted(device.link for device in devices),
        "networks": _counted(device.net_health for device in devices),
        "driver": report.driver,
        "firmware": report.firmware,
    }
    return {name: value for name, value in facts.items() if value}


def _of_machine(machine: Machine) -> dict[str, str]:
    facts = {}
    if machine.memory and machine.available is not None:
        facts["memory"] = f"{gib(machine.available)} of {gib(machine.memory)} free"
    if machine.huge_pages:
        facts["huge pages"] = gib(machine.huge_pages)
    if machine.shared_memory is not None:
        facts["shared memory"] = f"{gib(machine.shared_memory)} used"
    if machine.mtu:
        facts["MTU"] = str(machine.mtu)
    if machine.governor:
        facts["governor"] = machine.governor[0]
    return facts


def _counted(values: Iterable[str]) -> str:
    """Count what devices say: `16 OK`, or `15 OK, 1 Alarm`."""
    counts = Counter(filter(None, values)).most_common()
    return ", ".join(f"{count} {value}" for value, count in counts)
