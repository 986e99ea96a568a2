"""Recording what a host's tools print, for a test case or a report. Changes nothing."""

from datetime import UTC, datetime
from typing import Any

from pd_deploy.engines.device_report import DeviceTools
from pd_deploy.hosts import batch, facts, machine
from pd_deploy.hosts.batch import Lane
from pd_deploy.hosts.redaction import Redaction
from pd_deploy.steps.asking import promptly
from pd_deploy.steps.inspecting import devices_on
from pd_deploy.steps.session import Session

LIMIT_S = 120
FORMAT = 1
NAME = ["uname", "-n"]
_SYSCTLS = (
    "net.core.somaxconn", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports",
    "vm.nr_hugepages", "kernel.shmmax", "kernel.numa_balancing",
)  # fmt: skip
COMMANDS: Lane = (
    NAME,
    *machine.COMMANDS,
    facts.LISTENERS,
    ["uname", "-srmo"],
    ["cat", "/etc/os-release"],
    ["lscpu"],
    ["docker", "version"],
    ["docker", "info"],
    ["ip", "-4", "route"],
    ["ip", "-s", "link"],
    ["sysctl", *_SYSCTLS],
)


async def capture(session: Session, name: str, *, keep_addresses: bool = False) -> dict[str, Any]:
    """Record what the tools of a host print, without serial numbers and secrets.

    Args:
        keep_addresses: whether public addresses stay.
    """
    host, tools = session.host(name), session.engine.device_tools(session.deployment)
    # Its tools may take long, so whether it answers at all is tried before.
    await promptly(host, host.output(NAME))
    first, lanes = _device_lanes(tools, devices_on(session, name))
    command = batch.command([*COMMANDS, *first], lanes, LIMIT_S)
    done = await host.run(command, check=False, timeout=LIMIT_S + 20)
    printed = batch.parse(done.stdout)
    redact = Redaction({batch.of(printed, NAME).text.strip(): name}, keep_addresses=keep_addresses)
    return {
        "format": FORMAT,
        "host": name,
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "commands": [
            {
                "argv": list(argv),
                "output": redact(batch.of(printed, argv).text),
                "exit": batch.of(printed, argv).exit_status,
            }
            for lane in ([*COMMANDS, *first], *lanes)
            for argv in lane
        ],
    }


def _device_lanes(tools: DeviceTools | None, devices: list[int]) -> tuple[Lane, list[Lane]]:
    if tools is None:
        return [], []
    first, lanes = tools.lanes(devices, full=True)
    return [*first, *tools.further(devices)], lanes
