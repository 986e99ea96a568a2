"""The flat form of a plan: lists of a host's directories, files and commands side by side. Pure.

Plans had this form before each instance had a plan of its own. `plan.json` of older generations
still has it, and fingerprints are still made of it: of any other form every service would get a
new generation, and restart, when pd-deploy itself is upgraded.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from pd_deploy.hosts.container_values import ContainerSpec


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class FlatFile(_Frozen):
    """A file, and the stage that writes it: `launch` or `ranktable`."""

    path: str
    mode: str
    content: str
    stage: str


class FlatCommand(_Frozen):
    """What an instance's start script runs and exports."""

    instance: str
    argv: list[str]
    environment: dict[str, str]


class FlatHost(_Frozen):
    """All of one host.

    Containers, start scripts and commands are in the same order of instances. So are the
    directories, two for each instance, after the one of the ranktables.
    """

    address: str
    actions: list[dict[str, str]] = []
    directories: list[str]
    containers: dict[str, ContainerSpec]
    files: list[FlatFile]
    commands: list[FlatCommand]

    def by_instance(self) -> dict[str, Any]:
        """Sort everything by instance: the fields of a `HostPlan`.

        Raises:
            ValueError: an instance lacks something.
        """
        ranktables = [file for file in self.files if file.stage == "ranktable"]
        shared = self.directories[: 1 if ranktables else 0]
        directories = self.directories[len(shared) :]
        by_order = zip(
            self.containers.items(),
            self.commands,
            [file for file in self.files if file.stage == "launch"],
            directories[::2],
            directories[1::2],
            strict=True,
        )
        return {
            "address": self.address,
            "actions": self.actions,
            "ranktables": {"directory": shared[0], "files": _dumped(ranktables)}
            if shared
            else None,
            "instances": {
                name: {
                    "directory": directory,
                    "log_directory": log_directory,
                    "start_script": start_script.model_dump(),
                    "container": container,
                    "command": command.model_dump(),
                }
                for (name, container), command, start_script, directory, log_directory in by_order
            },
        }


class FlatPlan(_Frozen):
    """All that a fingerprint stands for."""

    deployment: str
    generation: str
    image: str
    hosts: dict[str, FlatHost]


def _dumped(files: list[FlatFile]) -> list[dict[str, str]]:
    return [file.model_dump() for file in files]
