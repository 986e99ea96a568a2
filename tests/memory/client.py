"""The Docker engine of a machine in memory: its API as the SDK's client has it."""

import hashlib
import io
import json
import shlex
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import requests
from docker import errors as sdk

from tests.memory import load, programs
from tests.memory.machine import Build, Container, LocalImage, Machine
from tests.memory.playbook import Workbench

NEVER = "0001-01-01T00:00:00Z"


class NotYet(Exception):
    """The answer is not there yet: to be asked again."""


@dataclass
class _Execution:
    """A command in a container, and how it ended."""

    container: Container
    argv: list[str]
    environment: Mapping[str, str]
    directory: str
    code: int = 0

    def run(self) -> Iterator[tuple[bytes | None, bytes | None]]:
        """What it prints to its outputs."""
        argv, program = self.argv, self.container.program
        if isinstance(program, Workbench):
            printed, self.code = program.execute(argv, self.environment, self.directory)
            yield printed.encode(), None
            return
        if argv[:2] != ["sh", "-c"]:
            self.code = 127
            yield f"exec: {argv[0]!r}: executable file not found in $PATH".encode(), None
            return
        for part in argv[2].split(";"):
            words = shlex.split(part)
            if words[0] == "echo" and words[-1] == ">&2":
                yield None, f"{' '.join(words[1:-1])}\n".encode()
            elif words[0] == "echo":
                yield f"{' '.join(words[1:])}\n".encode(), None
            elif words[0] == "exit":
                self.code = int(words[1])


class MemoryClient:
    """What `docker.APIClient` offers, as far as pd-deploy uses it; errors in the engine's words."""

    api_version = "1.47"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._stopping: dict[str, float] = {}
        self._pulling: dict[str, float] = {}
        self._executions: dict[str, _Execution] = {}
        self._loads: dict[str, tuple[str, float]] = {}
        """By what is asked: what is printed of it, and when."""

    def info(self) -> dict[str, Any]:
        return {
            "ServerVersion": "27.5.1",
            "Driver": "overlay2",
            "DockerRootDir": "/var/lib/docker",
            "Architecture": "aarch64",
            "SecurityOptions": self._machine.security_options,
        }

    def inspect_image(self, ref: str) -> dict[str, Any]:
        image = self._machine.find_image(ref)
        if image is None:
            raise _refused(404, f"No such image: {ref}")
        return {
            "Id": image.id,
            "RepoDigests": sorted(image.digests),
            "RepoTags": sorted(image.tags),
            "Architecture": image.build.architecture,
        }

    def inspect_distribution(self, ref: str, auth_config: Mapping[str, str]) -> dict[str, Any]:
        build = self._build(ref)
        platforms = [{"architecture": build.architecture, "os": "linux"}]
        return {"Descriptor": {"digest": build.digest}, "Platforms": platforms}

    def pull(self, ref: str, **_: object) -> Iterator[dict[str, Any]]:
        build = self._build(ref)
        self._take_time(ref)
        self._machine.pull(ref, build)
        yield {"status": f"Digest: {build.digest}"}

    def load_image(self, data: Iterable[bytes]) -> Iterator[dict[str, str]]:
        self._take_time("load")
        with tarfile.open(fileobj=io.BytesIO(b"".join(data))) as tar:
            members = {member.name: tar.extractfile(member) for member in tar}
            content = {name: member.read() for name, member in members.items() if member}
        try:
            (image,) = json.loads(content["manifest.json"])
            config = content[image["Config"]]
        except KeyError as missing:
            yield {"error": f"open {missing}: no such file or directory"}
            return
        image_id = f"sha256:{hashlib.sha256(config).hexdigest()}"
        build = Build(image_id, architecture=json.loads(config)["architecture"])
        loaded = self._machine.images.setdefault(image_id, LocalImage(image_id, build))
        for name in image["RepoTags"] or []:
            self.tag(image_id, *name.rsplit(":", 1))
        yield {"stream": f"Loaded image ID: {loaded.id}\n"}

    def tag(self, ref: str, repository: str, tag: str) -> bool:
        image = self._machine.find_image(ref)
        if image is None:
            raise _refused(404, f"No such image: {ref}")
        for other in self._machine.images.values():
            other.tags.discard(f"{repository}:{tag}")
        image.tags.add(f"{repository}:{tag}")
        return True

    def remove_image(self, name: str, noprune: bool) -> None:
        image = self._machine.find_image(name)
        if image is None:
            raise _refused(404, f"No such image: {name}")
        repositories = {_repository(other) for other in image.tags | image.digests}
        last = len(repositories) == 1 and len(image.tags) <= 1
        if last and any(c.image is image for c in self._machine.containers.values()):
            raise _refused(409, f"conflict: unable to remove repository reference {name}")
        image.tags.discard(name)
        image.digests.discard(name)
        # The last tag of a repository takes the repository's digests along.
        if "@" not in name and _repository(name) not in map(_repository, image.tags):
            image.digests = {d for d in image.digests if _repository(d) != _repository(name)}
        if (not image.tags and not image.digests) or (name == image.id and len(image.tags) <= 1):
            del self._machine.images[image.id]

    def containers(
        self, all: bool, filters: Mapping[str, list[str]] | None = None
    ) -> list[dict[str, Any]]:
        self._machine.cluster.settle()
        wanted = [label.partition("=") for label in (filters or {"label": []})["label"]]
        return [
            {
                "Id": one.id,
                "Names": [f"/{one.name}"],
                "Image": one.config["Image"],
                "Labels": one.labels,
                "State": one.status,
            }
            for one in self._machine.containers.values()
            if all or one.running
            if _has(one.labels, wanted)
        ]

    def inspect_container(self, name: str) -> dict[str, Any]:
        one = self._find(name)
        return {
            "Id": one.id,
            "Name": f"/{one.name}",
            "Image": one.image.id,
            "Config": one.config,
            "State": {
                "Status": one.status,
                "ExitCode": one.exit_code,
                "OOMKilled": one.oom_killed,
                "Error": one.error,
                "StartedAt": one.started_at.isoformat() if one.started_at else NEVER,
                "FinishedAt": one.finished_at.isoformat() if one.finished_at else NEVER,
            },
        }

    def create_container_from_config(self, config: dict[str, Any], name: str) -> dict[str, str]:
        machine = self._machine
        image = machine.find_image(config["Image"])
        if image is None:
            raise _refused(404, f"No such image: {config['Image']}")
        for mount in config["HostConfig"].get("Mounts", []):
            if machine.disk.get(mount["Source"]) is None:
                why = f"bind source path does not exist: {mount['Source']}"
                raise _refused(400, f'invalid mount config for type "bind": {why}')
        for other in machine.containers.values():
            if other.name == name:
                why = f'The container name "/{name}" is already in use by container "{other.id}"'
                raise _refused(409, f"Conflict. {why}")
        machine.cluster.made += 1
        container_id = f"{machine.cluster.made:064x}"
        machine.containers[container_id] = Container(container_id, name, config, image)
        return {"Id": container_id}

    def start(self, name: str) -> None:
        one = self._find(name)
        for device in one.config["HostConfig"].get("Devices", []):
            path = device["PathOnHost"]
            if self._machine.disk.get(path) is None:
                why = f'error gathering device information while adding custom device "{path}"'
                one.error = f"{why}: no such file or directory"
                raise _refused(500, one.error)
        for mount in one.config["HostConfig"].get("Mounts", []):
            if self._machine.disk.get(mount["Source"]) is None:
                why = f'error mounting "{mount["Source"]}" to rootfs at "{mount["Target"]}"'
                raise _refused(400, f"{why}: stat {mount['Source']}: no such file or directory")
        if not one.running:
            programs.start(self._machine, one)

    def stop(self, name: str, timeout: int) -> None:
        one, now = self._find(name), self._machine.clock.seconds()
        if not one.running or one.program is None:
            return
        if one.run_id not in self._stopping:
            self._stopping[one.run_id] = now + timeout
            one.program.signal(one.config.get("StopSignal", "SIGTERM"))
            one.program.settle()
        if one.running and now >= self._stopping[one.run_id]:
            self._machine.end(one, 137)
        if one.running:
            raise NotYet

    def kill(self, name: str, signal: str) -> None:
        one = self._find(name)
        if not one.running or one.program is None:
            raise _refused(409, f"cannot kill container: {name}: container {one.id} is not running")
        if signal == "SIGKILL":
            self._machine.end(one, 137)
        else:
            one.program.signal(signal)

    def remove_container(self, name: str, v: bool, force: bool) -> None:
        one = self._find(name)
        if one.running and not force:
            why = f"container is running: stop the container before removing or force remove: {v}"
            raise _refused(409, f"cannot remove container {one.name!r}: {why}")
        del self._machine.containers[one.id]

    def wait(self, name: str) -> dict[str, int]:
        one = self._find(name)
        if one.running:
            raise NotYet
        return {"StatusCode": one.exit_code}

    def logs(
        self,
        name: str,
        *,
        since: float | None = None,
        tail: int | str = "all",
        timestamps: bool = False,
        stream: bool = False,
        follow: bool = False,
    ) -> Any:
        assert not follow, "nobody follows"
        lines = [
            f"{when.isoformat()} {line}" if timestamps else line
            for when, line in self._find(name).log
            if since is None or when.timestamp() >= since
        ]
        kept = [line.encode() for line in (lines if tail == "all" else lines[-int(tail) :])]
        return iter(kept) if stream else b"".join(kept)

    def exec_create(
        self,
        name: str,
        argv: list[str],
        environment: Mapping[str, str] | None = None,
        workdir: str | None = None,
        stdin: bool = False,
    ) -> dict[str, str]:
        one = self._find(name)
        if not one.running:
            raise _refused(409, f"container {one.id} is not running")
        execution = _Execution(one, argv, environment or {}, workdir or "/")
        self._executions[f"exec-{len(self._executions)}"] = execution
        return {"Id": f"exec-{len(self._executions) - 1}"}

    def exec_start(
        self, id: str, *, stream: bool = False, demux: bool = False, detach: bool = False
    ) -> Iterator[tuple[bytes | None, bytes | None]]:
        """In a container of the playbook's what it makes of it; elsewhere `sh -c` with some of
        `echo`, `echo … >&2` and `exit`, and the engine's load generator. No other program is
        there."""
        assert detach or (stream and demux)
        execution = self._executions[id]
        if load.is_asked(execution.argv):
            return iter([(self._load(execution).encode(), None)])
        return iter(list(execution.run()))

    def exec_inspect(self, id: str) -> dict[str, int]:
        return {"ExitCode": self._executions[id].code}

    def _load(self, asked: _Execution) -> str:
        """What a load generator prints, once it has ended."""
        key, now = asked.argv[-1], self._machine.clock.seconds()
        if key not in self._loads:
            said, seconds = load.carried(
                self._machine, asked.container, asked.argv, asked.environment
            )
            self._loads[key] = said, now + seconds
        said, ends = self._loads[key]
        if now < ends and asked.container.running:
            raise NotYet
        del self._loads[key]
        return said if asked.container.running else ""

    def _take_time(self, what: str) -> None:
        """What brings an image takes as long as the machine says."""
        now = self._machine.clock.seconds()
        if now < self._pulling.setdefault(what, now + self._machine.pulls_for):
            raise NotYet
        del self._pulling[what]

    def _find(self, name: str) -> Container:
        self._machine.cluster.settle()
        for one in self._machine.containers.values():
            if name in (one.id, one.name):
                return one
        raise _refused(404, f"No such container: {name}")

    def _build(self, ref: str) -> Build:
        cluster = self._machine.cluster
        hosts = {pushed.partition("/")[0] for pushed in cluster.registry}
        if cluster.registry_down or ref.partition("/")[0] not in hosts:
            raise _refused(500, f"dial tcp: {ref}: connect: connection refused")
        if ref not in cluster.registry:
            raise _refused(404, f"manifest for {ref} not found: manifest unknown")
        return cluster.registry[ref]


def _has(labels: Mapping[str, str], wanted: list[tuple[str, str, str]]) -> bool:
    return all(
        key in labels and (not equals or labels[key] == value) for key, equals, value in wanted
    )


def _repository(name: str) -> str:
    """Of a tag or a digest."""
    return name.partition("@")[0] if "@" in name else name.rpartition(":")[0]


def _refused(status: int, explanation: str) -> sdk.APIError:
    response = requests.Response()
    response.status_code = status
    kind = sdk.NotFound if status == 404 else sdk.APIError
    return kind(explanation, response=response, explanation=explanation)
