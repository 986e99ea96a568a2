"""The simulated NPUs of the host: who holds them, which address they have."""

import os
import re
import socket
import subprocess
from pathlib import Path

from standin.ranktable import Device
from standin.rules import Refusal, host_path


def hold(device_ids: list[int]) -> list[socket.socket]:
    """Take the devices for this process; the returned sockets hold them until it ends.

    An abstract UNIX socket per device: with host networking all containers of a host share that
    namespace, and the kernel frees the name when the holder dies, however it dies.
    """
    prefix = os.environ.get("STANDIN_NPU_PREFIX", "standin-npu-")
    holders = []
    for device_id in device_ids:
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(f"\0{prefix}{device_id}")
        except OSError:
            raise Refusal("device-busy", f"device {device_id} (npu-smi info shows by whom)") from None
        holders.append(holder)
    return holders


def of_host() -> set[int]:
    """List the host's physical device ids from /etc/hccn.conf; none without that file."""
    try:
        text = Path(host_path("/etc/hccn.conf")).read_text()
    except OSError:
        return set()
    return {int(found) for found in re.findall(r"^\w+_(\d+)=", text, re.MULTILINE)}


def check_addresses(devices: list[Device]) -> None:
    """Compare the device_ip of each device with hccn_tool."""
    for device in devices:
        reported = _reported_address(device.device_id)
        if reported != device.device_ip:
            raise Refusal(
                "device-ip",
                f"device {device.device_id}: ranktable {device.device_ip}, hccn_tool {reported}",
            )


def _reported_address(device_id: int) -> str:
    command = [host_path("/usr/bin/hccn_tool"), "-i", str(device_id), "-ip", "-g"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Refusal("device-ip", f"cannot run hccn_tool: {error}") from None
    first = (done.stdout or done.stderr).strip().partition("\n")[0]
    if not first.startswith("ipaddr:"):
        raise Refusal("device-ip", f"device {device_id}: hccn_tool says {first!r}")
    return first.removeprefix("ipaddr:").strip()
