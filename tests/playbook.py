"""The documented 3P1D as upstream's playbook starts it on the lab's hosts: containers that a shell
keeps alive, and in them, by `docker exec -d`, scripts that leave servers and proxy behind (contract
sections 2, 4 and 5).

Names, options, directories and the order are the playbook's. What it derives from its inventory is
taken from a plan of pd-deploy with `compat: upstream`, which tests compare with the playbook's.

    python -m tests.playbook LAB PLAN.json      # of `pd-deploy plan FILE --format json`
"""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pd_deploy.lab import Lab, LabHost

NAMES = {
    "prefill": "omni_infer_prefill",
    "decode": "omni_infer_decode",
    "proxy": "omni_infer_proxy",
}
"""What the file calls `container.names`, the playbook DOCKER_NAME_P, _D and _C."""
SCRIPTS = "/tmp/scripts_path"
RANKTABLES = "/tmp/ranktable_save_path"
LOGS = "/data/log_path"
CODE = "/workspace"
MOUNTS = (
    "/data", "/tmp", "/usr/local/Ascend/driver", "/usr/local/dcmi", "/usr/local/bin/npu-smi",
    "/etc/ascend_install.info", "/usr/local/sbin", "/etc/hccn.conf", "/usr/bin/hccn_tool",
    LOGS, "/data/models/QwQ-32B", SCRIPTS, RANKTABLES,
)  # fmt: skip


class Playbook:
    """A service of the playbook's on a lab.

    Args:
        plan: `pd-deploy plan FILE --format json`.
        image: as `docker run` gets it.
    """

    def __init__(self, lab: Lab, plan: Mapping[str, Any], image: str) -> None:
        self.lab = lab
        self.plan = plan
        self.image = image

    def __iter__(self) -> Iterator[tuple[LabHost, str, Mapping[str, Any]]]:
        for host, planned in self.plan["hosts"].items():
            for instance, made in planned["instances"].items():
                yield self.lab.hosts[host], instance, made

    @staticmethod
    def name(instance: str) -> str:
        """The container's name."""
        role = {"p": "prefill", "d": "decode", "c": "proxy"}[instance[0]]
        return f"{NAMES[role]}_{instance}"

    def start(self, **secrets: str) -> None:
        """Tags run_docker, ranktable, run_proxy and run_server.

        Args:
            secrets: further variables of the servers' processes.
        """
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda each: self._run_docker(*each), self):
                pass
        for host, planned in self.plan["hosts"].items():
            for file in planned["ranktables"]["files"]:
                self._write(self.lab.hosts[host], self._here(file["path"]), file["content"])
        # Decode before prefill; between them the playbook sleeps for 45 s.
        for host, instance, made in sorted(self, key=lambda each: "cdp".index(each[1][0])):
            self._exec(host, instance, made["command"], secrets)

    def _run_docker(self, host: LabHost, instance: str, planned: Mapping[str, Any]) -> None:
        """As `docker_run_cmd` does; privileged and with 500 GB shared memory where the lab can."""
        made = planned["container"]
        options = ["-it", f"--shm-size={made['shm_size']}", f"--privileged={made['privileged']}"]
        options += ["-e", f"CODE_PATH={CODE}", "-e", f"RANKTABLE_SAVE_PATH={RANKTABLES}"]
        options += ["-e", f"LOG_PATH={LOGS}", "--net=host", "-u", "root", "-w", "/data"]
        options += [f"--device={device}" for device in made["devices"]]
        options += ["--entrypoint=bash"]
        options += [word for path in MOUNTS for word in ("-v", f"{path}:{path}")]
        options += ["-v", "/usr/share/zoneinfo/Asia/Shanghai:/etc/localtime"]
        if instance.startswith("c"):
            options += ["-e", f"PROXY_NODE_PORT={made['labels']['pd-deploy.ports']}"]
        host.run(["docker", "run", *options, "-d", "--name", self.name(instance), self.image])

    def _exec(
        self, host: LabHost, instance: str, command: Mapping[str, Any], secrets: Mapping[str, str]
    ) -> None:
        environment = {k: self._here(v) for k, v in command["environment"].items()}
        argv, logs = [self._here(word) for word in command["argv"]], f"{LOGS}/{instance}"
        launch = f"cd {CODE}/omniinfer/tools/scripts\nmkdir -p {logs}\n"
        if instance.startswith("c"):
            script = f"#!/bin/bash\n{launch}{shlex.join(argv)}\n"
            given = {"http_proxy": "", "https_proxy": "", "HOST": instance}
        else:
            exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in environment.items())
            role = environment["ROLE"]
            script = (
                f"#!/bin/bash\nsource ~/.bashrc\n{exports}{launch}"
                f"{shlex.join(argv)} >> {logs}/run_{role}.log 2>&1 &\n"
            )
            given = {"HOST": instance, **secrets}
        path = f"{SCRIPTS}/run_{instance}.sh"
        self._write(host, path, script, "0750")
        options = [word for k, v in given.items() for word in ("-e", f"{k}={v}")]
        host.run(["docker", "exec", *options, "-d", self.name(instance), "/bin/bash", "-c", path])

    def _here(self, text: str) -> str:
        """A value with the playbook's directories in it."""
        generation = self.plan["generation"]
        deployment = self.plan["deployment"]
        text = text.replace(f"/var/lib/pd-deploy/{deployment}/{generation}/ranktables", RANKTABLES)
        return text.replace(f"{LOGS}/{deployment}/{generation}", LOGS)

    @staticmethod
    def _write(host: LabHost, path: str, content: str, mode: str = "0644") -> None:
        host.run(["mkdir", "-p", path.rpartition("/")[0]])
        host.run(["tee", path], input=content)
        host.run(["chmod", mode, path])

    def states(self) -> dict[str, str]:
        """Docker's word for each container, by instance; `gone` for one that is not there."""
        states = {}
        for host, instance, _ in self:
            argv = ["docker", "inspect", "-f", "{{.State.Status}}", self.name(instance)]
            states[instance] = host.run(argv, check=False).stdout.strip() or "gone"
        return states

    def processes(self) -> dict[str, tuple[str, list[str]]]:
        """Arguments and environment of what each server's script has left behind, by instance."""
        script = (
            "for d in /proc/[0-9]*; do tr '\\0' ' ' <$d/cmdline | grep -q '^python start_api' && "
            "{ tr '\\0' ' ' <$d/cmdline; echo; tr '\\0' '\\n' <$d/environ; }; done; :"
        )
        found = {}
        for host, instance, _ in self:
            argv = ["docker", "exec", self.name(instance), "sh", "-c", script]
            arguments, *environment = host.run(argv).stdout.splitlines() or [""]
            found[instance] = arguments, sorted(environment)
        return found

    def logs(self) -> str:
        """The ends of all its logs."""
        tail = f"find {LOGS} -type f -exec tail -vn 15 {{}} +"
        return "\n".join(h.run(["sh", "-c", tail]).stdout for h in self.lab.hosts.values())

    def clean(self) -> None:
        """What the tag clean_up does, and the directories."""
        for host, instance, _ in self:
            host.run(["docker", "rm", "-f", self.name(instance)], check=False)
        for host in self.lab.hosts.values():
            host.run(["rm", "-rf", SCRIPTS, RANKTABLES, LOGS])


if __name__ == "__main__":
    of = Lab.load(sys.argv[1])
    Playbook(of, json.loads(Path(sys.argv[2]).read_text()), of.image).start()
