"""What we render for each contract, run as it is with the stand-in's programs of that contract."""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.config.load import parse_deployment
from pd_deploy.config.yaml_files import merge
from pd_deploy.engines.base import PROVING_ADDRESS, HostFacts, Layout, Service
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.engines.omniinfer.contracts import contract_of
from pd_deploy.lab.standin.processes import PYTHON, STANDIN, Instance, StandinSet, standin_set
from pd_deploy.planning import placement
from tests.lab.proxies import NGINX
from tests.unit import example

NUMBERS = {"model": "qwen", "prompt": "5, 7, 9, 11,", "max_tokens": 5}
BUILT = {"v0": "2026-03-26", "v1": "2026-06-29", "roles": "2026-07-24"}
SCRIPTS = STANDIN / "image/workspace/omniinfer/tools/scripts"
HIDDEN = "Ascend/latest/standin"


class Running:
    """A 2P1D set of a contract, started by our scripts; p0 and p1 share a host."""

    def __init__(self, instances: StandinSet, contract: str, directory: Path) -> None:
        self.instances, self.directory, self.lines = instances, directory, list[str]()
        self.service = service_of(instances, contract, directory)
        deployment = self.service.deployment
        tree = directory / "code/omniinfer"
        launcher = tree / contract_of(deployment).scripts
        launcher.parent.mkdir(parents=True)
        launcher.symlink_to(SCRIPTS)
        proxy = tree / contract_of(deployment).proxies["omni"][0]
        proxy.mkdir(parents=True)
        shutil.copy(STANDIN / "later/omni_proxy.sh", proxy)
        # The image's PATH, which its ~/.bashrc sets.
        (instances.directory / "bin/python").symlink_to(PYTHON)
        (directory / ".bashrc").write_text(f'PATH="{instances.directory}/bin:$PATH"\n')
        for files in omniinfer.ranktables(self.service).values():
            for path, content in files.items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text(content)
        for name, instance in instances.instances.items():
            given = {k: v for k, v in instance.env.items() if k.startswith("STANDIN_")}
            instance.env = given | {"HOME": str(directory)}
            instance.launcher = ["bash", str(self.script(name))]
            instance.args = {"--log-dir": self.service.layout.log_directory(name)}
            placed = self.service.topology.instance(name)
            assert placed is not None
            instance.api_port = placed.api_port

    def script(self, name: str) -> Path:
        """Write a start script; return its path."""
        path = self.directory / f"{name}.sh"
        path.write_text(omniinfer.start_script(self.service, name))
        return path


def service_of(instances: StandinSet, contract: str, directory: Path) -> Service:
    """The documented service, moved to the hosts and devices of a set."""
    names, places = list(instances.instances), instances.places
    hosts = {f"h{host}": instances.address(host) for host, _ in places.values()}
    base = 20000 + 10 * secrets.randbelow(900)

    def entry(name: str, index: int) -> dict[str, Any]:
        devices = ",".join(map(str, instances.device_ids(name)))
        moved = {omniinfer.BASE_PORT: base + 600 + 20 * index} if contract == "v1" else {}
        return {"host": f"h{places[name][0]}", "devices": devices, "environment": moved}

    entries = {name: entry(name, index) for index, name in enumerate(names)}
    document = example.document() | {
        "hosts": {name: f"10.0.0.{index}" for index, name in enumerate(hosts, 1)},
        "prefill": {name: each for name, each in entries.items() if name[0] == "p"},
        "decode": {name: each for name, each in entries.items() if name[0] == "d"},
    }
    of = parse_deployment(
        merge(
            document,
            {
                "image": "omni:silent",
                "contract": contract,
                "code": str(directory / "code"),
                "model": {"path": str(instances.directory / "model")},
                "paths": {"logs": str(directory / "logs"), "state": str(directory / "state")},
                # All on one machine, so apart over all hosts.
                "ports": {
                    "master": base,
                    "api": base + 100,
                    "zmq": base + 300,
                    "decode_offset": 10,
                },
                "proxy": {"c0": {"host": "h0", "port": base + 5, "program": "omni", "core_num": 1}},
            },
        )
    )
    # A file may not name loopback addresses, which the set's hosts have.
    moved = {n: host.model_copy(update={"address": hosts[n]}) for n, host in of.hosts.items()}
    of = of.model_copy(update={"hosts": moved})
    known = example.addresses(of)
    facts = {
        name: HostFacts("lo", {d: f"192.168.{name[1:]}.{100 + d}" for d in known[name]}, address)
        for name, address in hosts.items()
    }
    omniinfer.check_facts(of, facts)
    layout = Layout.of(of, example.GENERATION)
    return Service(of, placement.build(of), layout, facts, example.IMAGE)


@pytest.fixture(params=BUILT)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    contract = request.param
    of_standin = "v0" if contract.startswith("v0") else contract
    with standin_set(
        tmp_path / "set", prefills=2, built=BUILT[contract], contract=of_standin
    ) as instances:
        started = Running(instances, contract, tmp_path)
        instances.start()
        instances.wait_ready()
        yield started


class Proxy:
    """The proxy's script with nginx, a /usr/local and processes of its own, as in its container."""

    def __init__(self, running: Running, local: Path) -> None:
        self.lines: list[str] = []
        command = (
            f"mount -t overlay -o lowerdir={NGINX.root}/usr:/usr overlay /usr && "
            f"mount --bind {local} /usr/local && exec bash {running.script('c0')}"
        )
        self.process = subprocess.Popen(
            ["unshare", "-m", "-p", "-f", "--mount-proc", "bash", "-c", command],
            env=os.environ | NGINX.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def signal(self, number: int) -> None:
        """Signal the script, which is the first process of its namespace."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        os.kill(int(children.split()[0]), number)

    def until(self, line: str) -> None:
        """Read what it prints until it has said a line."""
        assert self.process.stdout is not None
        for said in self.process.stdout:
            self.lines.append(said.rstrip())
            if said.rstrip() == line:
                return
        raise AssertionError(f"it ended before {line!r}: {self.lines}")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def proxy(running: Running, nginx: None) -> Iterator[Proxy]:
    directory = Path("/var/tmp") / f"pd-test-{secrets.token_hex(4)}"
    # nginx's workers give up root: below pytest's own directory they could read nothing.
    modules, hidden = directory / "nginx/modules", directory / HIDDEN
    modules.mkdir(parents=True)
    hidden.mkdir(parents=True)
    shutil.copy(STANDIN / "image/usr/libexec/standin/pd_handover.lua", modules)
    contract = running.instances.contract
    (hidden / "contract").write_text(contract)
    (hidden / "built").write_text(running.instances.built or "")
    Path(running.service.layout.log_directory("c0")).mkdir(parents=True)
    started = Proxy(running, directory)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(directory)


def at(running: Running, address: str) -> Instance:
    """Something that asks the proxy at an address."""
    port = running.service.topology.proxies[0].port
    return replace(running.instances["p0"], host=address, api_port=port)


def test_servers_and_omni_proxy_serve_and_step_on_and_drain(running: Running, proxy: Proxy) -> None:
    proving, clients = at(running, PROVING_ADDRESS), at(running, running.instances.address(0))
    server = running.service.topology.prefill[0].servers[0]
    proxy.until(omniinfer.PREPARED)
    assert proving.refuses_connections()
    assert clients.refuses_connections()

    proxy.signal(signal.SIGUSR1)
    proxy.until(omniinfer.PROVING)
    assert clients.refuses_connections()
    assert proving.request("/v1/completions", NUMBERS).body["choices"][0]["text"] == " 13, 15, 17"
    assert proving.request(f"/proxy/{server}/health").status == 403

    proxy.signal(signal.SIGUSR1)
    proxy.until(omniinfer.OPENED)
    assert proving.refuses_connections() is False  # all addresses are open now
    assert clients.request("/v1/completions", NUMBERS).body["choices"][0]["text"] == " 13, 15, 17"
    log = running.instances["d0"].log()
    assert log.count('"POST /v1/completions HTTP/1.1" 200') == 2
    for path in ("/proxy", "//proxy", "/%70roxy", "/PROXY"):
        assert clients.request(f"{path}/{server}/health").status == 403

    running.instances["d0"].set_faults(token_seconds=0.1)
    connection = http.client.HTTPConnection(clients.host, clients.api_port, timeout=10)
    with contextlib.closing(connection):
        body = json.dumps(NUMBERS | {"stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        proxy.signal(signal.SIGTERM)
        assert answer.read().strip().endswith(b"data: [DONE]")
    assert proxy.process.wait(10) == 0
