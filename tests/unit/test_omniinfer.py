"""Containers, variants and start scripts. Values against the documented ones: test_golden.py."""

import hashlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pd_deploy.engines.base import Service
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.engines.omniinfer import launcher, proxy
from pd_deploy.errors import InvalidInput
from pd_deploy.hosts.container_values import ContainerSpec
from pd_deploy.planning import placement
from tests.unit import example

SERVERS = ("p0", "p1", "p2", "d0")
STATE = f"/var/lib/pd-deploy/qwq-3p1d/{example.GENERATION}"
BUILD = (
    example.ROOT
    / "lab/standin/image/workspace/omniinfer/omni/accelerators/sched/global_proxy/build.sh"
)
LOGS = f"/data/log_path/qwq-3p1d/{example.GENERATION}"


def spec(service: Service, name: str) -> ContainerSpec:
    return omniinfer.container(service, name)


def options(argv: list[str]) -> dict[str, Any]:
    """A launcher's arguments by name; those within `--extra-args` and the JSON values unpacked."""
    found: dict[str, Any] = {}
    words = iter(argv[2:])
    key = ""
    for word in words:
        if word.startswith("--") and key != "--extra-args":
            key = word
            found[key] = True
        else:
            found[key] = word
            key = ""
    extra = found.pop("--extra-args").split()
    for word, after in zip(extra, [*extra[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word.removeprefix("--")] = True if after.startswith("--") else after
    return found


def test_engine_ids_are_unique() -> None:
    service = example.for_engine()
    configs = [omniinfer.kv_transfer_config(service, i) for i in service.topology.instances]
    assert [c["engine_id"] for c in configs] == [c["kv_rank"] for c in configs] == [0, 1, 2, 3]
    assert {c["kv_parallel_size"] for c in configs} == {4}


@pytest.mark.parametrize(
    ("changes", "decode"),
    [
        ({"compat": "upstream"}, 0),
        ({"decode_engine_id": 7}, 7),
        ({"decode_engine_id": 0}, 0),
        ({"decode_engine_id": "kv-rank", "compat": "upstream"}, 3),
        # The default template of upstream has decode's kv_rank, as we have.
        ({"profile": "deepseek-r1-a3-2p1d", "compat": "upstream"}, 3),
    ],
)
def test_decodes_engine_id_is_the_profiles_or_the_files(
    changes: dict[str, Any], decode: int
) -> None:
    service = example.for_engine({"decode": {"d0": {"tensor_parallel": 8}}} | changes)
    configs = [omniinfer.kv_transfer_config(service, i) for i in service.topology.instances]
    assert [c["engine_id"] for c in configs] == [0, 1, 2, decode]


OLD, NEW = "prefill-pods-plus-one", "decode-tensor-parallel"
UNDATED = ("omni:silent", "omni@sha256:" + "0" * 64)


def kv_parallel_size(changes: dict[str, Any]) -> int:
    """What every instance of the example with these changes is given: 4 pods, 8 devices each."""
    service = example.for_engine(changes)
    configs = [omniinfer.kv_transfer_config(service, i) for i in service.topology.instances]
    (size,) = {config["kv_parallel_size"] for config in configs}
    assert isinstance(size, int)
    return size


class TestKvParallelSize:
    """What the engine reads it as depends on the image's age, and no wrong one may get by."""

    @pytest.mark.parametrize(
        ("tag", "size"),
        [
            ("20250812_99", 4),
            ("20250813_1", 8),
            ("release_v0.3.0", 4),
            ("release_v0.4.0", 8),
            ("release_v0.6.0-20251111-vllm", 8),
        ],
    )
    def test_follows_the_image(self, tag: str, size: int) -> None:
        assert kv_parallel_size({"image": f"omni:{tag}"}) == size
        right = {4: OLD, 8: NEW}[size]
        assert kv_parallel_size({"image": f"omni:{tag}", "kv_parallel_size": right}) == size
        assert kv_parallel_size({"image": f"omni:{tag}", "kv_parallel_size": size}) == size

    @pytest.mark.parametrize(
        ("tag", "value", "says"),
        [
            (
                "20250812_1",
                NEW,
                "expected prefill-pods-plus-one (4) for the image 20250812_1, built",
            ),
            ("20250813_1", OLD, "expected decode-tensor-parallel (8) for the image 20250813_1, bu"),
            ("release_v0.5.0", 4, "found 4: decode would read the KV of other heads"),
            ("20250813_1", OLD, "found prefill-pods-plus-one (4): decode would read the KV of oth"),
        ],
    )
    def test_of_another_age_is_refused_unless_it_is_allowed(
        self, tag: str, value: str | int, says: str
    ) -> None:
        changes = {"image": f"omni:{tag}", "kv_parallel_size": value}
        with pytest.raises(InvalidInput) as caught:
            example.place(changes)
        (problem,) = caught.value.problems
        assert problem.key == "kv_parallel_size"
        assert says in problem.message
        given = {OLD: 4, NEW: 8}.get(str(value), value)
        assert kv_parallel_size({**changes, "allow": ["kv-parallel-size"]}) == given

    def test_that_is_the_same_number_either_way_is_right(self) -> None:
        """Seven prefills and decode on 8 devices: both meanings are 8."""
        hosts = {f"h{i}": f"10.0.1.{i}" for i in range(1, 9)}
        prefill = {f"x{i}": {"host": f"h{i}", "devices": "0-7"} for i in range(1, 5)}
        changes = {"hosts": hosts, "prefill": prefill}
        for tag in ("20250812_1", "20250813_1"):
            for value in ("by-image", OLD, NEW, 8):
                of = {**changes, "image": f"omni:{tag}", "kv_parallel_size": value}
                assert kv_parallel_size(of) == 8

    @pytest.mark.parametrize("image", UNDATED)
    def test_of_an_image_that_does_not_tell_it_has_to_be_given(self, image: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            placement.build(example.service({"image": image}), [ImageFacts()])
        (problem,) = caught.value.problems
        assert problem.key == "kv_parallel_size"
        found = "the tag silent, which does not tell the image's age" if "@" not in image else "a d"
        assert f"found {found}" in problem.message
        assert "`contract: v0-early` (built before 2025-08-13), `v0` (until" in problem.message
        for contract, size in (("v0-early", 4), ("v0", 8), ("v1", 4), ("roles", 4)):
            changes = {"image": image, "contract": contract, "allow": ["ports-distinct"]}
            assert kv_parallel_size(changes) == size
        for value, size in ((OLD, 4), (NEW, 8)):
            assert kv_parallel_size({"image": image, "kv_parallel_size": value}) == size
        assert kv_parallel_size({"image": image, "kv_parallel_size": 7}) == 7
        assert kv_parallel_size({"image": image, "allow": ["kv-parallel-size"]}) == 8


@pytest.mark.parametrize("name", [*SERVERS, "c0"])
def test_container_is_the_documented_one_but_for_the_differences(name: str) -> None:
    found = spec(example.for_engine(), name)
    (argv,) = [
        argv
        for title, argv in example.GOLDEN["docker_argv"][name].items()
        if title.startswith("Run container")
    ]
    mounts = {v for flag, v in pairwise(argv) if flag == "-v"}
    variables = {v for flag, v in pairwise(argv) if flag == "-e"}
    for word in ("--net=host", "--privileged=true", "--shm-size=500g", "--entrypoint=bash"):
        assert word in argv
    assert (found.network_mode, found.privileged) == ("host", True)
    assert (found.shm_size, found.entrypoint) == (500 << 30, ("bash",))
    assert (found.user, found.working_dir) == (
        argv[argv.index("-u") + 1],
        argv[argv.index("-w") + 1],
    )
    assert [f"--device={d}" for d in found.devices] == [w for w in argv if "--device" in w]
    ours = {f"{m.source}:{m.target}" for m in found.mounts}
    assert mounts - ours == {
        "/tmp:/tmp",  # nothing of ours lies there
        "/tmp/scripts_path:/tmp/scripts_path",  # start scripts lie in the generation's directory
        "/tmp/ranktable_save_path:/tmp/ranktable_save_path",  # so do ranktables
        "/data/log_path:/data/log_path",  # only the generation's part of it
        "/data/local_code_path:/data/local_code_path",  # the code of the image is the default
    }
    assert ours - mounts == {f"{STATE}:{STATE}", f"{LOGS}:{LOGS}"}
    assert {m.source for m in found.mounts if m.read_only} == {
        STATE,
        "/usr/share/zoneinfo/Asia/Shanghai",
    }
    assert set(found.environment) == {variable.partition("=")[0] for variable in variables}
    assert found.environment.get("PROXY_NODE_PORT") == ("7000" if name == "c0" else None)
    # The server is the main process: no terminal, an init, the launcher's own stop signal.
    assert (found.tty, found.init, found.stop_signal) == (False, True, "SIGINT")
    assert found.command == (f"{STATE}/{name}/start.sh",)
    assert (found.stop_timeout or 0) >= 30
    assert found.image == example.IMAGE


def test_names_hold_role_instance_and_generation() -> None:
    service = example.for_engine({"container": {"names": {"decode": "my-decode"}}})
    assert spec(service, "p1").name == f"omni-infer-prefill_p1_{example.GENERATION}"
    assert spec(service, "d0").name == f"my-decode_d0_{example.GENERATION}"


def test_prefill_starts_once_decode_has_started() -> None:
    of, placed = example.service(), example.place()
    assert {name: omniinfer.starts_after(of, placed, name) for name in placed.names} == {
        **dict.fromkeys(("p0", "p1", "p2"), ("d0",)),
        "d0": (),
        "c0": (),
    }


def test_ranktables_lie_where_the_environment_says() -> None:
    service = example.for_engine()
    for host in ("a", "b"):
        files = omniinfer.ranktables(service)[host]
        for instance in service.topology.on_host(host):
            environment = omniinfer.environment(service, instance.name)
            assert environment["RANK_TABLE_FILE_PATH"] in files
            assert environment["GLOBAL_RANK_TABLE_FILE_PATH"] in files
        assert len(files) == 3
    merged = f"{STATE}/ranktables/global_ranktable_merge.json"
    assert len({files[merged] for files in omniinfer.ranktables(service).values()}) == 1


class TestVariants:
    @pytest.mark.parametrize("name", SERVERS)
    def test_every_interface_variable_follows_the_hosts_interface(self, name: str) -> None:
        environment = omniinfer.environment(example.for_engine(interface="ens3"), name)
        kinds = ("", "GLOO_", "TP_", "HCCL_")
        assert [environment[f"{kind}SOCKET_IFNAME"] for kind in kinds] == ["ens3"] * 4

    @pytest.mark.parametrize("name", ["p0", "c0"])
    def test_code_of_the_host_is_mounted_and_used(self, name: str) -> None:
        service = example.for_engine({"code": "/data/local_code_path"})
        found = spec(service, name)
        assert "/data/local_code_path" in {m.source for m in found.mounts}
        assert found.environment["CODE_PATH"] == "/data/local_code_path"
        script = omniinfer.start_script(service, name)
        assert "cd /data/local_code_path/omniinfer/tools/scripts" in script
        assert "/workspace" not in script

    def test_unprivileged_instances_get_their_own_devices(self) -> None:
        service = example.for_engine({"container": {"privileged": False}})
        common = ("/dev/davinci_manager", "/dev/hisi_hdc", "/dev/devmm_svm")
        own = tuple(f"/dev/davinci{d}" for d in range(8, 16))
        assert spec(service, "d0").devices == (*common, *own)
        assert spec(service, "c0").devices == common
        assert spec(service, "d0").privileged is False

    def test_time_zone_mounts_its_file(self) -> None:
        service = example.for_engine({"container": {"time_zone": "UTC"}})
        assert ("/usr/share/zoneinfo/UTC", "/etc/localtime") in {
            (m.source, m.target) for m in spec(service, "p0").mounts
        }

    def test_local_nginx_sources_are_mounted_in_the_proxy_and_copied(self) -> None:
        tarball = "/data/nginx's.tar.gz"
        service = example.for_engine({"proxy": {"c0": {"nginx_tarball": tarball}}})
        assert tarball in {m.source for m in spec(service, "c0").mounts}
        assert tarball not in {m.source for m in spec(service, "p0").mounts}
        script = omniinfer.start_script(service, "c0")
        assert f"cp {shlex.quote(tarball)} nginx-1.24.0.tar.gz" in script
        assert "curl" not in script

    @pytest.mark.parametrize("of", ["nginx.org", "a host"])
    @pytest.mark.parametrize("is_genuine", [True, False])
    def test_nginx_is_built_of_the_expected_sources_only(
        self, tmp_path: Path, of: str, is_genuine: bool
    ) -> None:
        """Root runs their build script."""
        sources = tmp_path / "the source's.tar.gz"
        sources.write_bytes(b"sources")
        given = {"nginx_tarball": str(sources)} if of == "a host" else {}
        digest = hashlib.sha256(b"sources" if is_genuine else b"others").hexdigest()
        service = example.for_engine({"proxy": {"c0": {**given, "nginx_sha256": digest}}})
        fetch = proxy.fetch_nginx(service.topology.proxies[0])
        assert "http:" not in fetch
        url, copy = "https://nginx.org/download/nginx-1.24.0.tar.gz", shlex.quote(str(sources))
        curl = f'curl() {{ [ "$4" = {url} ] && cp {copy} "$3"; }}'
        done = subprocess.run(
            ["bash", "-c", f"{curl}\n{fetch}\necho went on"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (0 if is_genuine else 1)
        assert ("went on" in done.stdout) is is_genuine
        assert is_genuine or f"with SHA-256 {digest}, found " in done.stdout

    @pytest.mark.parametrize("built", ["2025-07-22", "2026-01-31"])
    def test_sources_are_built_whichever_version_the_build_script_would_take(
        self, tmp_path: Path, built: str
    ) -> None:
        """Upstream's passes over those of another version than it wants, and downloads its own."""
        root, sources = tmp_path / "root", tmp_path / "nginx-1.24.0"
        sources.mkdir()
        subprocess.run(
            ["tar", "czf", "nginx-1.24.0.tar.gz", sources.name], cwd=tmp_path, check=True
        )
        sources.rmdir()
        for name, text in (
            ("usr/local/Ascend/latest/standin/built", built),
            ("usr/libexec/standin/nginx", "binary"),
            ("usr/libexec/standin/pd_handover.lua", "lua"),
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        (tmp_path / "build.sh").symlink_to(BUILD)
        done = subprocess.run(
            ["bash", "-c", proxy.BUILD_NGINX],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "STANDIN_ROOT": str(root)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (root / "usr/local/nginx/nginx").read_text() == "binary"

    def test_http_proxy_is_for_building_only(self) -> None:
        service = example.for_engine({"http_proxy": "http://proxy.example:3128"})
        assert omniinfer.environment(service, "c0") == {
            "http_proxy": "http://proxy.example:3128",
            "https_proxy": "http://proxy.example:3128",
        }
        script = omniinfer.start_script(service, "c0")
        assert script.index("build.sh") < script.index("unset http_proxy https_proxy")
        assert script.index("unset http_proxy https_proxy") < script.index('"${proxy[@]}"')
        assert "proxy.example" not in omniinfer.start_script(service, "p0")

    def test_instance_settings_win_over_the_template(self) -> None:
        service = example.for_engine(
            {
                "prefill": {
                    "p0": {
                        "environment": {"HCCL_BUFFSIZE": 7, "FLAG": True, "IP": "10.9.9.9"},
                        "arguments": {"enforce-eager": False, "seed": 1},
                    }
                }
            }
        )
        environment = omniinfer.environment(service, "p0")
        found = options(omniinfer.command(service, "p0"))
        assert [environment[key] for key in ("HCCL_BUFFSIZE", "FLAG", "IP")] == [
            "7",
            "1",
            "10.9.9.9",
        ]
        assert "enforce-eager" not in found
        assert found["seed"] == "1"


HOSTILE = """it's "$(touch /tmp/owned)" `id` \\ ; exit 9 # ${HOME} !! *"""


class TestStartScripts:
    @pytest.mark.parametrize("name", [*SERVERS, "c0"])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {
                "model": {"served_name": HOSTILE, "path": f"/data/{HOSTILE.replace('/', '_')}"},
                "code": "/data/a b's $(id)",
                "http_proxy": "http://proxy.example:3128/$(id)'",
                "settings": {"all": {"environment": {"X": HOSTILE}}},
                "proxy": {"c0": {"nginx_tarball": "/data/a b's $(id).tar.gz"}},
            },
        ],
        ids=["plain", "hostile"],
    )
    def test_are_valid_bash(self, name: str, changes: dict[str, Any]) -> None:
        script = omniinfer.start_script(example.for_engine(changes), name)
        checked = subprocess.run(
            ["bash", "-n"], input=script, text=True, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")

    @pytest.mark.parametrize("name", SERVERS)
    def test_reach_the_launcher_with_every_value_intact(self, name: str, tmp_path: Any) -> None:
        """Runs the script with a `python` that prints what it was given."""
        code = tmp_path / "a b's $(id)"
        scripts = code / "omniinfer/tools/scripts"
        scripts.mkdir(parents=True)
        service = example.for_engine(
            {
                "model": {"served_name": HOSTILE},
                "code": str(code),
                "settings": {"all": {"environment": {"X": HOSTILE, "MULTI": "a\nb"}}},
            }
        )
        python = tmp_path / "bin/python"
        python.parent.mkdir()
        python.write_text('#!/bin/bash\nprintf "%s\\0" "$PWD" "$X" "$MULTI" "$@"\n')
        python.chmod(0o755)
        # The image's ~/.bashrc sets PATH and may set variables that are ours to decide.
        (tmp_path / ".bashrc").write_text(f'PATH="{python.parent}:$PATH"; export X=overwritten\n')
        ran = subprocess.run(
            ["bash", "-c", omniinfer.start_script(service, name)],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        line, _, rest = ran.stdout.partition("\n")
        assert line.startswith(omniinfer.STARTED)
        assert rest.split("\0")[:-1] == [
            str(scripts),
            HOSTILE,
            "a\nb",
            "-c",
            launcher.REUSING_PORTS,
            *omniinfer.command(service, name)[1:],
        ]


class TestOptionsOfTheProxy:
    """What the proxy's script in the image is given, seen by running ours with one that records."""

    KNOWN: ClassVar[dict[str, str]] = {
        "--prefill-max-num-seqs": "64",
        "--decode-max-num-seqs": "64",
        "--access-log-file": f"{LOGS}/c0/nginx_access.log",
    }

    def given(
        self, tmp_path: Path, changes: dict[str, Any], known: Sequence[str] = ()
    ) -> dict[str, str]:
        """The options by name that a script gets which knows some of the later ones."""
        code = tmp_path / "a b's"
        service = example.for_engine({**changes, "code": str(code)})
        plain = omniinfer.command(service, "c0")[2:]
        script = code / "omniinfer/tools/scripts/global_proxy.sh"
        script.parent.mkdir(parents=True)
        script.write_text(
            f"""\
for word in "$@"; do
    case $word in
        {" | ".join([*plain[::2], *known, "--dry-run"])}) ;;
        --*) echo "unknown option $word" >&2; exit 1 ;;
    esac
done
printf "%s\\0" "$X" "$@" >"{tmp_path}/said"
"""
        )
        nginx = tmp_path / "bin/nginx"
        nginx.parent.mkdir()
        nginx.symlink_to("/bin/false")  # ends the script at its test of the configuration
        # Without that test it would wait for a signal; then `timeout` ends it, and all it started.
        ran = subprocess.run(
            ["timeout", "-k", "2", "30", "bash", "-c", omniinfer.start_script(service, "c0")],
            env={"HOME": str(tmp_path), "PATH": f"{nginx.parent}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 1
        assert "unknown option" not in ran.stderr
        said = (tmp_path / "said").read_text().split("\0")[:-1]
        assert said[-1] == "--dry-run"
        assert said[1 : 1 + len(plain)] == plain
        words = iter(said[1:-1])
        return {"X": said[0]} | dict(zip(words, words, strict=True))

    def test_an_old_image_is_given_only_what_its_script_knows(self, tmp_path: Path) -> None:
        assert not self.KNOWN.keys() & self.given(tmp_path, {}).keys()

    @pytest.mark.parametrize("known", KNOWN)
    def test_each_option_is_tried_by_itself(self, tmp_path: Path, known: str) -> None:
        assert self.KNOWN.keys() & self.given(tmp_path, {}, [known]).keys() == {known}

    def test_slots_and_access_log_follow_from_the_file(self, tmp_path: Path) -> None:
        changes = {
            "settings": {"decode": {"arguments": {"max-num-seqs": 24}}},
            "prefill": {"p1": {"arguments": {"max-num-seqs": "96"}}},
        }
        found = self.given(tmp_path, changes, list(self.KNOWN))
        assert {option: found[option] for option in self.KNOWN} == self.KNOWN | {
            "--prefill-max-num-seqs": "96",
            "--decode-max-num-seqs": "24",
        }

    def test_what_no_pod_says_is_not_passed(self, tmp_path: Path) -> None:
        changes = {"settings": {"prefill": {"arguments": {"max-num-seqs": False}}}}
        found = self.given(tmp_path, changes, list(self.KNOWN))
        assert self.KNOWN.keys() - found.keys() == {"--prefill-max-num-seqs"}

    @pytest.mark.parametrize("name", ["decode-max-num-seqs", "decode_max_num_seqs"])
    def test_what_the_file_gives_wins_and_is_always_passed(self, tmp_path: Path, name: str) -> None:
        changes = {
            "proxy": {
                "c0": {
                    "arguments": {name: 5, "client-body-buffer-size": HOSTILE},
                    "environment": {"X": HOSTILE},
                }
            }
        }
        found = self.given(tmp_path, changes, list(self.KNOWN))
        assert found[f"--{name}"] == "5"
        assert [o for o in found if o.replace("_", "-") == "--decode-max-num-seqs"] == [f"--{name}"]
        assert found["--client-body-buffer-size"] == found["X"] == HOSTILE


# Looks whether its port is free as the image's launcher does, and says how it was started.
LAUNCHER = """\
import os, socket, sys
import beside
with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
    probe.bind(("", int(os.environ["API_PORT"])))
print("started", __name__, sys.argv, beside.__file__, sys.path[0])
"""


class TestPortOfTheLauncher:
    """A start script with a launcher like the image's, run for real on a port of this machine."""

    def start(self, tmp_path: Path, port: int, script: str | None = None) -> tuple[int, str]:
        """Its exit code and all it says."""
        scripts = tmp_path / "omniinfer/tools/scripts"
        scripts.mkdir(parents=True)
        (scripts / "start_api_servers.py").write_text(LAUNCHER)
        (scripts / "beside.py").touch()
        (tmp_path / "python").symlink_to(sys.executable)
        (tmp_path / ".bashrc").write_text(f'PATH="{tmp_path}:$PATH"\n')
        service = example.for_engine({"code": str(tmp_path), "ports": {"api": port}})
        ran = subprocess.run(
            ["bash", "-c", script or omniinfer.start_script(service, "p0")],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "API_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return ran.returncode, ran.stdout

    @pytest.fixture
    def left(self) -> int:
        """A port with a connection in TIME_WAIT, because the server's side closed first."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port: int = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)) as client:
                server.accept()[0].close()
                assert client.recv(1) == b""
        return port

    def test_may_have_connections_that_are_waiting_to_be_forgotten(
        self, tmp_path: Path, left: int
    ) -> None:
        code, said = self.start(tmp_path, left)
        assert code == 0, said
        scripts = tmp_path / "omniinfer/tools/scripts"
        assert f"{scripts}/beside.py {scripts}" in said
        assert "started __main__ ['start_api_servers.py', '--num-servers', '1', " in said

    def test_may_not_be_listened_on(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            code, said = self.start(tmp_path, server.getsockname()[1])
        assert code != 0
        assert "Address already in use" in said
        assert "started" not in said

    def test_started_plainly_the_launcher_takes_it_for_taken(
        self, tmp_path: Path, left: int
    ) -> None:
        plain = f"cd {tmp_path}/omniinfer/tools/scripts; exec {sys.executable} start_api_servers.py"
        code, said = self.start(tmp_path, left, plain)
        assert code != 0
        assert "Address already in use" in said
