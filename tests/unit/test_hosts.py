"""What the hosts layer says and reads, without a host."""

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest
from docker import errors as sdk

from pd_deploy import errors
from pd_deploy.errors import CommandFailed, InvalidInput, PdDeployError, Problem, is_transient
from pd_deploy.hosts import docker_create, link, login
from pd_deploy.hosts.container_values import (
    ContainerSpec,
    Mount,
    PullMeter,
    RegistryLogin,
    state_of,
)
from pd_deploy.hosts.docker_errors import container_error, pull_error
from pd_deploy.hosts.facts import (
    LINKS,
    parse_disk_free,
    parse_ephemeral,
    parse_interface,
    parse_links,
    parse_listeners,
    parse_loopback,
    parse_taken,
)
from pd_deploy.hosts.login import Login, known_hosts_line
from pd_deploy.hosts.threads import in_thread
from pd_deploy.steps import surveying
from pd_deploy.steps.session import Session
from tests.unit import example

WHERE = "a (10.0.0.1)"


class TestErrors:
    def test_says_where_what_and_what_next(self) -> None:
        error = PdDeployError("expected x, found y", host=WHERE, instance="p1", hint="do z")
        assert str(error) == "host a (10.0.0.1), instance p1: expected x, found y → do z"

    def test_input_errors_list_all_problems(self) -> None:
        error = InvalidInput([Problem("a.b", "no"), Problem("c", "nor this")], source="x.yaml")
        assert str(error) == "x.yaml: 2 problems\n  a.b: no\n  c: nor this"

    @pytest.mark.parametrize(
        "error",
        [
            InvalidInput([Problem("a", "b")], source="x.yaml"),
            CommandFailed("failed", argv=["a", "b"], exit_status=3, stderr="s", host=WHERE),
            errors.FileMissing("gone", path="/x", hint="make it"),
        ],
    )
    def test_survives_pickling(self, error: PdDeployError) -> None:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)

    def test_only_transient_ones_are_worth_a_retry(self) -> None:
        assert is_transient(errors.HostUnreachable("x"))
        assert not is_transient(errors.AuthenticationFailed("x"))
        assert not is_transient(ValueError("x"))

    def test_the_picture_shows_the_whole_tree(self) -> None:
        assert errors.__doc__ is not None
        for name, value in vars(errors).items():
            if isinstance(value, type) and issubclass(value, PdDeployError):
                assert name in errors.__doc__


class TestSecrets:
    def test_do_not_show_in_a_login(self) -> None:
        login = Login("root", private_key="SECRET1", passphrase="SECRET2", password="SECRET3")
        assert "SECRET" not in repr(login)

    def test_do_not_show_in_a_registry_login(self) -> None:
        assert "SECRET" not in repr(RegistryLogin("me", "SECRET"))

    def test_do_not_show_in_a_container_spec(self) -> None:
        spec = ContainerSpec(name="x", image="i", environment={"http_proxy": "http://u:SECRET@p"})
        assert "SECRET" not in repr(spec)

    def test_do_not_show_when_a_key_is_unreadable(self) -> None:
        with pytest.raises(errors.AuthenticationFailed) as caught:
            Login("root", private_key="SECRET", passphrase="SECRET").options(WHERE)
        assert "SECRET" not in str(caught.value)


class TestKnownHosts:
    def test_line_is_what_asyncssh_reads(self) -> None:
        key = asyncssh.generate_private_key("ssh-ed25519", "a comment")
        public = asyncssh.import_public_key(key.export_public_key())
        line = known_hosts_line("10.0.0.1", 2222, public)
        assert line.startswith("[10.0.0.1]:2222 ssh-ed25519 ")
        known = asyncssh.import_known_hosts(line)
        assert known.match("10.0.0.1", "10.0.0.1", 2222)[0]
        assert not known.match("10.0.0.1", "10.0.0.1", None)[0]


class TestCreate:
    def test_smallest_spec(self) -> None:
        assert docker_create.request(ContainerSpec(name="c", image="i")) == {
            "name": "c",
            "config": {
                "Image": "i",
                "Tty": False,
                "HostConfig": {
                    "NetworkMode": "host",
                    "Privileged": False,
                    "Init": True,
                    "RestartPolicy": {"Name": "no"},
                    "LogConfig": {
                        "Type": "json-file",
                        "Config": {"max-size": "100m", "max-file": "3"},
                    },
                },
            },
        }

    def test_full_spec(self) -> None:
        spec = ContainerSpec(
            name="c",
            image="i",
            command=("bash", "-c", "x"),
            entrypoint=(),
            environment={"A": "1"},
            mounts=(Mount(source="/s", target="/t", read_only=True),),
            devices=("/dev/davinci0", "/dev/a:/dev/b"),
            shm_size=1024,
            stop_signal="SIGINT",
            stop_timeout=30,
            labels={"l": "v"},
            user="0",
            working_dir="/w",
            ipc_mode="host",
            cap_add=("SYS_PTRACE",),
        )
        config = docker_create.request(spec)["config"]
        host = config["HostConfig"]
        assert config["Cmd"] == ["bash", "-c", "x"]
        assert config["Env"] == ["A=1"]
        assert (config["StopSignal"], config["StopTimeout"]) == ("SIGINT", 30)
        assert (config["User"], config["WorkingDir"]) == ("0", "/w")
        assert config["Labels"] == {"l": "v"}
        assert host["Mounts"] == [
            {"Type": "bind", "Source": "/s", "Target": "/t", "ReadOnly": True}
        ]
        assert [d["PathInContainer"] for d in host["Devices"]] == ["/dev/davinci0", "/dev/b"]
        assert (host["ShmSize"], host["IpcMode"], host["CapAdd"]) == (
            1024,
            "host",
            ["SYS_PTRACE"],
        )
        assert "Binds" not in host

    def test_an_empty_entrypoint_replaces_the_images(self) -> None:
        spec = ContainerSpec(name="c", image="i", entrypoint=())
        # [""] is how the Engine API is told to drop the image's entrypoint.
        assert docker_create.request(spec)["config"]["Entrypoint"] == [""]


class TestState:
    def inspected(self, **state: object) -> dict[str, object]:
        return {
            "Id": "1",
            "Name": "/c",
            "Image": "sha256:1",
            "Config": {"Labels": None, "Image": "i"},
            "State": {
                "Status": "created",
                "ExitCode": 0,
                "StartedAt": "0001-01-01T00:00:00Z",
                "FinishedAt": "0001-01-01T00:00:00Z",
                **state,
            },
        }

    def test_created_has_neither_times_nor_exit_code(self) -> None:
        state = state_of(self.inspected())
        assert (state.exit_code, state.started_at, state.finished_at) == (None, None, None)
        assert state.name == "c"
        assert not state.running

    def test_exited_has_its_exit_code(self) -> None:
        state = state_of(
            self.inspected(
                Status="exited",
                ExitCode=137,
                OOMKilled=True,
                StartedAt="2026-01-02T03:04:05.123456789Z",
            )
        )
        assert (state.exit_code, state.oom_killed) == (137, True)
        assert state.started_at is not None
        assert state.started_at.microsecond == 123456


class TestPullMeter:
    def test_adds_up_layers_and_keeps_the_digest(self) -> None:
        meter = PullMeter()
        for message in [
            {"status": "Pulling from x", "id": "v1"},
            {"status": "Pulling fs layer", "id": "l1"},
            {"status": "Already exists", "id": "l2"},
            {
                "status": "Downloading",
                "id": "l1",
                "progressDetail": {"current": 5, "total": 10},
            },
        ]:
            meter.read(message)
        assert meter.progress == meter.read({"status": "whatever"})
        assert (meter.progress.layers_done, meter.progress.layers) == (1, 2)
        assert (meter.progress.bytes_done, meter.progress.bytes_total) == (5, 10)
        done = meter.read({"status": "Pull complete", "id": "l1", "progressDetail": {}})
        assert (done.layers_done, done.bytes_done) == (2, 10)
        meter.read({"status": "Digest: sha256:abc"})
        assert meter.digest == "sha256:abc"


class TestEngineErrors:
    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("manifest for x:1 not found: manifest unknown: manifest unknown", "ImageNotFound"),
            ("pull access denied for x, repository does not exist", "RegistryDenied"),
            ("Get https://r/v2/: no basic auth credentials", "RegistryDenied"),
            ("unauthorized: authentication required", "RegistryDenied"),
            ("dial tcp 10.0.0.9:443: connect: connection refused", "RegistryUnavailable"),
            ("net/http: TLS handshake timeout", "RegistryUnavailable"),
            ("toomanyrequests: rate limit", "RegistryUnavailable"),
            ("x509: certificate signed by unknown authority", "RegistryMisconfigured"),
            ("http: server gave HTTP response to HTTPS client", "RegistryMisconfigured"),
            ("write /var/lib/docker/x: no space left on device", "DiskFull"),
            ("error parsing HTTP 403 response body: invalid character 'm'", "RegistryDenied"),
            ("filesystem layer verification failed for digest sha256:1", "RegistryUnavailable"),
            ("unknown blob", "ImageNotFound"),
            ("invalid reference format", "DockerRefused"),
        ],
    )
    def test_pull(self, text: str, kind: str) -> None:
        error = pull_error(text, "x:1", WHERE)
        assert type(error).__name__ == kind
        assert error.host == WHERE

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (
                "received unexpected HTTP status: 503 Service Unavailable",
                "answers with a server error",
            ),
            ("dial tcp 10.0.0.9:443: connect: connection refused", "refuses connections"),
            ("dial tcp: lookup r.example: no such host", "can't resolve the name"),
            ("tls: first record does not look like a TLS handshake", "speaks plain HTTP"),
            ("expected HTTP 206 from byte range request", "was interrupted"),
            ("error unmarshalling content: invalid character '<' looking for", "is not a registry"),
            ("error parsing HTTP 429 response body: invalid character 'm'", "is rate-limiting"),
        ],
    )
    def test_a_registrys_fault_is_told_as_what_it_is(self, text: str, says: str) -> None:
        """The texts are Docker Engine 20's, of servers that misbehave so."""
        error = pull_error(text, "x:1", WHERE)
        assert says in error.message
        assert text in error.message

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            (
                'invalid mount config for type "bind": bind source path does not exist: /data/x',
                "FileMissing",
            ),
            (
                'error gathering device information while adding custom device "/dev/davinci9": '
                "no such file or directory",
                "FileMissing",
            ),
            (
                'Conflict. The container name "/c" is already in use by container '
                '"0123456789abcdef". You have to remove it',
                "NameTaken",
            ),
            ("No such image: x:1", "ImageNotFound"),
            ("No such container: c", "ContainerMissing"),
            ("removal of container 1234 is already in progress", "ContainerMissing"),
            ("unable to apply caps: operation not permitted", "DockerRefused"),
        ],
    )
    def test_container(self, text: str, kind: str) -> None:
        error = container_error(sdk.APIError("m", explanation=text), "create c", WHERE)
        assert type(error).__name__ == kind

    def test_a_missing_device_is_named(self) -> None:
        text = (
            'error gathering device information while adding custom device "/dev/davinci9": '
            "no such file or directory"
        )
        error = container_error(sdk.APIError("m", explanation=text), "start c", WHERE)
        assert isinstance(error, errors.FileMissing)
        assert error.path == "/dev/davinci9"


class Told:
    """A host that says which interfaces it has, and nothing else."""

    def __init__(self, address: str, links: str) -> None:
        self.address, self.where, self.links = address, f"a ({address})", links
        self.docker = SimpleNamespace(info=self.nothing, listed=self.nothing, states=self.nothing)

    async def outputs(self, *commands: Sequence[str]) -> list[str]:
        return [self.links if argv[0] == "ip" else "" for argv in commands]

    async def nothing(self, *_: object) -> list[object]:
        return []


class TestFacts:
    IP = (
        '[{"ifname":"lo","addr_info":[{"local":"127.0.0.1"}]},{},'
        '{"ifname":"e","addr_info":[{},{"local":"10.0.0.2"}]}]'
    )

    def test_interface(self) -> None:
        assert parse_interface(self.IP, "10.0.0.2") == "e"
        assert parse_interface(self.IP, "10.0.0.1") is None

    def links(self, *links: tuple[str, list[str], str]) -> str:
        return json.dumps(
            [
                {"ifname": name, "flags": flags, "addr_info": [{"local": address}]}
                for name, flags, address in links
            ]
        )

    @pytest.mark.parametrize(
        ("name", "flags"),
        [("lo", ["LOOPBACK", "UP"]), ("lo", []), ("lo1", ["UP", "LOOPBACK"])],
    )
    def test_a_loopback_interface_is_never_the_hosts_own(self, name: str, flags: list[str]) -> None:
        only = self.links((name, flags, "10.0.0.2"), ("eth0", ["UP"], "10.0.0.3"))
        assert parse_interface(only, "10.0.0.2") is None
        assert parse_loopback(only, "10.0.0.2") == name
        assert parse_loopback(only, "10.0.0.3") is None
        both = self.links((name, flags, "10.0.0.2"), ("eth0", ["UP"], "10.0.0.2"))
        assert parse_interface(both, "10.0.0.2") == "eth0"

    @pytest.mark.parametrize(
        ("address", "says"),
        [
            (
                "10.0.0.7",
                "expected its address 10.0.0.7 on an interface that the other hosts reach, "
                "found it only on lo→ give hosts.a the address of a network interface",
            ),
            (
                "10.0.0.9",
                "expected the host to have its address 10.0.0.9, found no interface with it"
                "→ correct hosts.a in the deployment file",
            ),
        ],
    )
    async def test_a_survey_says_where_the_address_is(self, address: str, says: str) -> None:
        links = self.links(("lo", ["LOOPBACK"], "10.0.0.7"), ("eth0", ["UP"], "10.0.0.3"))
        hosts: Any = {"a": Told(address, links)}
        session = Session(example.service({"hosts": {"a": address}}), hosts)
        with pytest.raises(errors.FactsError) as caught:
            await surveying.survey(session, "a")
        error = caught.value
        assert error.host == f"a ({address})"
        assert f"{error.message}→ {error.hint}".startswith(says)

    @pytest.mark.parametrize("output", ["", "Usage: ip", "{}x", "[1]"])
    def test_interface_of_garbage(self, output: str) -> None:
        with pytest.raises(errors.FactsError, match="expected a JSON list"):
            parse_interface(output, "127.0.0.1", WHERE)

    def test_listeners(self) -> None:
        output = (
            'LISTEN 0 128  10.0.0.1:22   0.0.0.0:*  users:(("sshd",pid=7,fd=3))\n'
            "LISTEN 0 511  [::]:7000     [::]:*\n"
            'LISTEN 0 511  *:9000        *:*     users:(("nginx",pid=8,fd=6),("x",pid=9,fd=6))\n'
            "LISTEN 0 4096 127.0.0.53%lo:53 0.0.0.0:*\n"
        )
        assert parse_listeners(output) == {
            22: "sshd (pid 7)",
            7000: "",
            9000: "nginx (pid 8)",
            53: "",
        }

    def test_ports_taken(self) -> None:
        """By listeners, outbound connections and binds; not by what is over."""
        output = (
            'LISTEN     0 128  10.0.0.1:9000   0.0.0.0:*  users:(("nginx",pid=7,fd=3))\n'
            'ESTAB      0 0    10.0.0.1:9000   10.0.0.2:51000 users:(("nginx",pid=7,fd=9))\n'
            'ESTAB      0 0    10.0.0.1:9001   10.0.0.2:443 users:(("curl",pid=8,fd=5))\n'
            "SYN-SENT   0 1    10.0.0.1:9002   10.0.0.3:443\n"
            "TIME-WAIT  0 0    10.0.0.1:9003   10.0.0.2:50000\n"
            "FIN-WAIT-2 0 0    [::ffff:10.0.0.1]:9004 [::ffff:10.0.0.2]:50000\n"
            "ESTAB      0 0    10.0.0.1:9005   10.0.0.2:443\n"
            "BOUND 9000\nBOUND 9006\n"
        )
        assert parse_taken(output, [*range(9000, 9005), 9006]) == {
            9000: "nginx (pid 7)",
            9001: "curl (pid 8)",
            9002: "an outbound connection",
            9006: "",
        }
        over = dict.fromkeys((9003, 9004), "connections that are over (TIME_WAIT)")
        assert parse_taken(output, [9003, 9004, 9007], reused=False) == over

    def test_links(self, tmp_path: Path) -> None:
        """Of a directory as caches of models have it; and where a link to all of it leads."""
        model = tmp_path / "hub" / "snapshots" / "abc"
        model.mkdir(parents=True)
        (tmp_path / "hub" / "blob").touch()
        (model / "a name").symlink_to("../../blob")
        (model / "gone").symlink_to("/no/such/file")
        (tmp_path / "short").symlink_to(tmp_path / "hub")
        by_link = tmp_path / "short" / "snapshots" / "abc"
        command = ["sh", "-c", LINKS, "sh", str(by_link), str(tmp_path / "short")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = parse_links(done.stdout)
        assert found.links == {
            str(by_link): str(model),
            str(by_link / "a name"): str(tmp_path / "hub" / "blob"),
            str(by_link / "gone"): "",
        }
        assert found.paths == {str(tmp_path / "short"): str(tmp_path / "hub")}

    @pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
    @pytest.mark.parametrize("closed", ["", "sub", "sub/weights", "blob"])
    def test_what_root_may_not_read(self, closed: str) -> None:
        """As nobody, whom `id` calls root: that is what a network file system may make of root."""
        with tempfile.TemporaryDirectory() as name:
            place, model = Path(name), Path(name) / "model"
            (model / "sub").mkdir(parents=True)
            (place / "id").write_text("#!/bin/sh\necho 0\n")
            (place / "blob").touch()
            (model / "sub/weights").touch()
            for unused in (".snapshot", "lost+found"):
                (model / unused).mkdir(mode=0o700)
            (model / "config").symlink_to("../blob")
            (place / "id").chmod(0o755)
            place.chmod(0o755)
            (place if closed == "blob" else model).joinpath(closed).chmod(0o700)
            done = subprocess.run(
                ["sh", "-c", LINKS, "sh", str(model)],
                capture_output=True, text=True, check=True, user=65534, group=65534,
                env={"PATH": f"{place}:{os.environ['PATH']}"},
            )  # fmt: skip
            named = model / ("config" if closed == "blob" else closed)
            assert parse_links(done.stdout).closed == [str(named)]

    @pytest.mark.parametrize(
        ("output", "ports"),
        [
            ("32768\t60999\n\n", [32768, 36000, 60999]),
            ("32768\t60999\n36000,50000-61000\n", [32768]),
            ("nonsense", []),
        ],
    )
    def test_ports_in_the_ephemeral_range(self, output: str, ports: list[int]) -> None:
        assert parse_ephemeral(output, [9000, 32767, 32768, 36000, 60999, 61000]) == ports

    def test_listeners_of_garbage(self) -> None:
        with pytest.raises(errors.FactsError, match="ss -Hltnp"):
            parse_listeners("State Recv-Q", WHERE)

    def test_disk_free(self) -> None:
        output = (
            "Filesystem 1024-blocks Used Available Capacity Mounted on\n"
            "/dev/mapper/a b 1000 600 400 60% /data\n"
        )
        assert parse_disk_free(output) == 400 * 1024
        with pytest.raises(errors.FactsError, match="df -P -k"):
            parse_disk_free("df: no", WHERE)


@pytest.mark.parametrize(
    ("exc", "why"),
    [
        (OSError(113, "Connect call failed ('10.0.0.1', 22)"), "no route to host"),
        (ConnectionRefusedError(111, "Connect call failed"), "connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (OSError("Multiple exceptions: a, b"), "Multiple exceptions: a, b"),
        (TimeoutError(), "no answer within 5 s"),
    ],
)
def test_why_there_is_no_connection_is_said_in_words(exc: Exception, why: str) -> None:
    assert link._reason(exc, 5) == why


class TestThreads:
    def test_a_call_that_hangs_does_not_keep_the_process(self) -> None:
        program = (
            "import asyncio, time\n"
            "from pd_deploy.hosts.threads import in_thread\n"
            "async def main():\n"
            "    async with asyncio.timeout(0.1):\n"
            "        await in_thread(lambda: time.sleep(600), 'hangs')\n"
            "asyncio.run(main())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "TimeoutError" in done.stderr

    async def test_errors_and_results_come_back(self) -> None:
        assert await in_thread(lambda: 1, "x") == 1
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0, "x")


@pytest.mark.parametrize("before", ["", "# mine", "# mine\n", "# mine\n\n"])
def test_a_key_that_is_remembered_gets_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Also where the last line of known_hosts has no end."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    known = tmp_path / ".ssh/known_hosts"
    known.write_text(before)
    for line in ("first", "second"):
        login._remember(known, line)
    assert known.read_text().split() == [*before.split(), "first", "second"]
    assert known.read_text().splitlines()[-2:] == ["first", "second"]
