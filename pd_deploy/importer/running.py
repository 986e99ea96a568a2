"""Comparing servers that run with what a deployment file renders. Pure."""

import posixpath
from collections.abc import Iterable

from pd_deploy.config.models import Deployment
from pd_deploy.hosts import exec_processes
from pd_deploy.hosts.exec_processes import Process
from pd_deploy.importer import launcher, round_trip
from pd_deploy.importer.report import Place, Report
from pd_deploy.importer.round_trip import Difference
from pd_deploy.importer.source import Argument, Server

_LAUNCHER = "start_api_servers.py"
_OF_SHELLS = {"HOSTNAME", "TERM", "_", "OLDPWD", "SHLVL"}


def server_of(made: Server, processes: Iterable[Process]) -> Server | None:
    """Read the server that a container's launcher starts; None where none runs.

    Args:
        made: the same instance as the file renders it.
    """
    found = next((p for p in processes if _launcher(p)), None)
    if found is None:
        return None
    place, quiet = Place(made.name, 0), Report()
    server = Server(made.name, made.role, made.address, made.pod, made.devices, place)
    environment = found.environment or {}
    for name in sorted(environment.keys() - _OF_SHELLS):
        launcher.take_environment(name, environment[name], server, place, quiet)
    launcher.read(
        [Argument(word, place) for word in _launcher(found)], _LAUNCHER, server, place, quiet
    )
    numbers = {
        "api_port": ("API_PORT",),
        "master_port": ("MASTER_PORT", "NODE_PORT"),
        "zmq_port": ("VLLM_LLMDATADIST_ZMQ_PORT", "ZMQ_PORT"),
    }
    for attribute, names in numbers.items():
        value = next((environment[name] for name in names if name in environment), "")
        if getattr(server, attribute) is None and value.isdecimal():
            setattr(server, attribute, int(value))
    return server


def _launcher(process: Process) -> list[str]:
    """Return the launcher's arguments, if it is one."""
    for at, word in enumerate(process.argv[:4]):
        if posixpath.basename(word) == _LAUNCHER:
            return list(process.argv[at + 1 :])
    return []


def devices_of(processes: Iterable[Process]) -> tuple[int, ...] | None:
    """Return the devices that a server's environment names; None where it names none."""
    value = exec_processes.known_environment(processes).get("ASCEND_RT_VISIBLE_DEVICES", "")
    numbers = value.split(",")
    return tuple(map(int, numbers)) if all(n.isdecimal() for n in numbers) else None


def differences(
    deployment: Deployment, running: dict[str, list[Process]]
) -> dict[str, list[Difference] | None]:
    """List what each running instance has otherwise than the file makes it; None for one whose
    launcher was not seen.

    Args:
        running: the processes of each instance, by name.
    """
    servers = round_trip.rendered(deployment)
    compared: dict[str, list[Difference] | None] = {}
    for name in running.keys() & servers.keys():
        original = server_of(servers[name], running[name])
        compared[name] = (
            None if original is None else list(round_trip.differences(original, servers[name]))
        )
    return compared
