"""A deployment file on the lab, and what can be seen of it there without pd-deploy."""

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.client import completes
from pd_deploy.lab import Lab, LabHost

ROOT = Path(__file__).resolve().parent.parent
INSTANCES = {"p0", "p1", "p2", "d0", "c0"}
STATE, LOGS, FAULTS = "/var/lib/pd-deploy", "/data/log_path", "/data/standin"
BUILT = "usr/local/Ascend/latest/standin/built"
"""Where the stand-in says how old it is: what it takes follows from that, as in the original."""
CONTAINERS = ["docker", "ps", "-aq", "--filter", "label=pd-deploy.deployment"]
# Digests first: with the last tag of a repository, the engine forgets its digests, too.
NAMES_OF_IMAGE = "{{range .RepoDigests}}{{println .}}{{end}}{{range .RepoTags}}{{println .}}{{end}}"


def write_file(lab: Lab, path: Path, **overrides: object) -> Path:
    """Write the documented 3P1D's deployment file for a lab."""
    document = {
        "extends": str(ROOT / "deployments/lab-qwq-3p1d.yaml"),
        "hosts": {name: host.address for name, host in lab.hosts.items()},
        "registry": {"host": lab.registry},
        **overrides,
    }
    path.write_text(yaml.safe_dump(document))
    return path


class LabService:
    """The documented 3P1D by its deployment file.

    Attributes:
        day: that of the tags which `tag` makes.
    """

    def __init__(self, path: Path, lab: Lab) -> None:
        self.path = path
        self.lab = lab
        self.day = datetime.date(2026, 1, 1)

    @property
    def file(self) -> str:
        """The file, as runs take it."""
        return str(self.path)

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://{self.lab.hosts['a'].address}:7000"

    def change(self, **overrides: object) -> None:
        """Lay overrides on the file."""
        document = yaml.safe_load(self.path.read_text()) | overrides
        self.path.write_text(yaml.safe_dump(document))

    def faults(self, instance: str, **faults: object) -> None:
        """Make an instance's engine misbehave."""
        for host in self.lab.hosts.values():
            host.run(["mkdir", "-p", FAULTS])
            host.run(["tee", f"{FAULTS}/{instance}.json"], input=json.dumps(faults))

    def containers(self, *, running: bool = False) -> dict[str, dict[str, Any]]:
        """Inspect the containers: by instance, the newest of each. One that only says what its
        image is belongs to none."""
        inspected = {}
        for host in self.lab.hosts.values():
            ids = host.run([*CONTAINERS, *(["--filter", "status=running"] if running else [])])
            if ids.stdout.split():
                # Those that have gone meanwhile are missing from what it prints, and make it fail.
                inspect = host.run(["docker", "inspect", *ids.stdout.split()], check=False)
                documents = json.loads(inspect.stdout)
                for container in sorted(documents, key=lambda document: document["Created"]):
                    if name := container["Config"]["Labels"].get("pd-deploy.instance"):
                        inspected[name] = container
        return inspected

    def image(self, tag: str, *, here: bool = False) -> str:
        """Name a tag's image as the file would have it, or as this lab's registry has it."""
        registry = self.lab.registry if here else "swr.cn-east-4.myhuaweicloud.com"
        return f"{registry}/omni-ci/daily_omniinfer:{tag}"

    def push(self, tag: str, files: Mapping[str, str]) -> str:
        """Push the stand-in image with other files, of the age that its tag tells; return its name
        for a run."""
        if day := re.match(r"(\d{4})(\d{2})(\d{2})_", tag):
            files = {BUILT: "-".join(day.groups()), **files}
        self.lab.push_variant(tag, files)
        return self.image(tag)

    def push_bad(self, tag: str, **faults: object) -> str:
        """Push an image whose engines misbehave."""
        return self.push(tag, {"/etc/standin.json": json.dumps(faults)})

    def tag(self, build: object) -> str:
        """Make a daily tag."""
        return f"{self.day:%Y%m%d}_{build}"

    def record(self) -> dict[str, Any]:
        """Read what became of the releases, as the proxy's host has it."""
        content = self.lab.hosts["a"].run(["cat", f"{STATE}/qwq-3p1d/record.json"]).stdout
        record: dict[str, Any] = json.loads(content)
        return record

    def completes(self) -> bool:
        """Tell whether a client gets a completion."""
        return completes(self.url)

    def host_of(self, instance: str) -> LabHost:
        """Return the host that an instance is on."""
        return self.lab.hosts["b" if instance in ("p2", "d0") else "a"]

    def kill(self, instance: str) -> None:
        """Kill an instance's container from outside."""
        container = self.containers()[instance]
        self.host_of(instance).run(["docker", "kill", container["Id"]])

    def clean(self) -> None:
        """Remove everything from the hosts, whatever state they are in.

        A host whose Docker engine hangs starts anew: the tests that follow need it.
        """
        for host in self.lab.hosts.values():
            host.mend()
            try:
                _clean(host)
            except subprocess.TimeoutExpired:
                print(host.blocked_in_engine(), file=sys.stderr)
                host.reboot()
                _clean(host)


def _clean(host: LabHost) -> None:
    ids = host.run(CONTAINERS).stdout.split()
    if ids:
        host.run(["docker", "rm", "-f", *ids])
    images = set(host.run(["docker", "images", "-q", "pd-deploy/*"]).stdout.split())
    if images:
        # By name: by its id, the engine refuses to remove an image of which another was made.
        names = host.run(["docker", "inspect", "-f", NAMES_OF_IMAGE, *images]).stdout.split()
        host.run(["docker", "rmi", "-f", *names])
    host.run(["rm", "-rf", STATE, FAULTS, LOGS])
