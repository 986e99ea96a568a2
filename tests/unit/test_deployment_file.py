"""Bad input ends in one clear message with the key's path, good input in a deployment."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pd_deploy.config import text_files, yaml_files
from pd_deploy.config.fields import parse_devices, parse_size, split_image
from pd_deploy.config.load import load_deployment, parse_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput
from pd_deploy.planning import placement
from tests.unit import example

WORDS_OF_THE_LIBRARY = ("Input should", "String should", "Dictionary should", "pattern '", "[key]")


def refused(changes: dict[str, Any]) -> InvalidInput:
    """The error that the example with these changes ends in."""
    with pytest.raises(InvalidInput) as caught:
        placement.build(example.service(changes))
    assert not [word for word in WORDS_OF_THE_LIBRARY if word in str(caught.value)]
    return caught.value


def read(directory: Path, content: str | bytes, name: str = "x.yaml") -> Deployment:
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_deployment(path)


@pytest.mark.parametrize("file", sorted((example.ROOT / "deployments").glob("*.yaml")), ids=str)
def test_the_deployments_of_the_project_load_and_build(file: Path) -> None:
    assert placement.build(load_deployment(file)).instances


def test_the_lab_differs_only_where_it_must() -> None:
    real = yaml_files.read(example.FILE)
    lab = yaml_files.read(example.FILE.with_name("lab-qwq-3p1d.yaml"))
    for key in ("hosts", "registry", "container", "disk"):
        real.pop(key, None)
        lab.pop(key, None)
    del real["ssh"]["credentials"], lab["ssh"]["credentials"]
    assert lab == real


class TestFile:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("", "expected a mapping of keys to values, found nothing"),
            ("- a\n", "expected a mapping of keys to values, found list"),
            ("name: a\nname: b\n", "line 2: the key 'name' is given twice"),
            ("model:\n  path: /a\n  path: /b\n", "line 3: the key 'path' is given twice"),
            ("model:\n\tpath: /a\n", "not valid YAML: line 2: found character '\\t'"),
            ("a: [1\n", "not valid YAML: line 2"),
            ("a: &a [*a]\n", "not valid YAML: line 1"),
            ("&a\nname: x\n<<: *a\n", "profile: expected one of"),
            ("? [a]\n: b\n", "not valid YAML"),
            ("1: a\n", "1: expected keys that are text, found 1"),
            (b"name: \xff\n", "expected UTF-8 text"),
            (b"name: \x00\n", "not valid YAML"),
            ("a: 2024-13-45\n", "which YAML reads as a date"),
            ('a: !!int ""\n', "not valid YAML"),
            ("a: !!bool maybe\n", "not valid YAML"),
            ("a: !!timestamp x\n", "not valid YAML"),
            ("a: !!python/object:os.system x\n", "not valid YAML: line 1"),
            ("# " + "x" * text_files.MAX_BYTES, "expected a file of at most"),
            ("extends: x.yaml\n", "extend each other in a circle: x.yaml → x.yaml"),
            ("extends: gone.yaml\n", "gone.yaml: cannot be read: No such file"),
            ("extends: [a]\n", "extends: expected the path of a file, found ['a']"),
            ('extends: "a\\0b"\n', "x.yaml: 1 problem\n  '"),
            ("extends: .\n", "expected a file, found a directory"),
            ("extends: /dev/zero\n", "expected a file, found a directory or a device"),
            (
                "name: a\n",
                "profile: expected one of deepseek-r1-a2-2p1d, deepseek-r1-a3-2p1d, ",
            ),
        ],
    )
    def test_that_cannot_be_read_says_why(
        self, tmp_path: Path, content: str | bytes, says: str
    ) -> None:
        with pytest.raises(InvalidInput) as caught:
            read(tmp_path, content)
        assert says in str(caught.value)
        assert str(tmp_path) in str(caught.value) or "/dev/zero" in str(caught.value)
        assert len(caught.value.problems) == 1

    def test_may_be_absent_or_a_directory(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "none.yaml"):
            with pytest.raises(InvalidInput, match=str(path)):
                load_deployment(path)

    def test_that_links_to_itself_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "loop.yaml").symlink_to("loop.yaml")
        with pytest.raises(InvalidInput, match=r"loop\.yaml"):
            load_deployment(tmp_path / "loop.yaml")

    @pytest.mark.parametrize("key", ["extends", "profile"])
    def test_one_that_is_missing_is_told_where_it_is_named(self, tmp_path: Path, key: str) -> None:
        """That is the file to change, though another one extends it."""
        (tmp_path / "y.yaml").write_text(f"name: a\n{key}: ./gone.yaml\n")
        with pytest.raises(InvalidInput) as caught:
            read(tmp_path, "extends: y.yaml\n")
        place = re.escape(f"{key}: {tmp_path / 'gone.yaml'}: cannot be read: No such file")
        assert re.search(rf"y\.yaml\b.*\bline 2: {place}", str(caught.value), re.DOTALL)

    def test_circle_of_two_names_both(self, tmp_path: Path) -> None:
        (tmp_path / "y.yaml").write_text("extends: x.yaml\n")
        with pytest.raises(InvalidInput, match=r"x\.yaml → y\.yaml → x\.yaml"):
            read(tmp_path, "extends: y.yaml\n")

    def test_extending_merges_mappings_and_null_removes(self, tmp_path: Path) -> None:
        found = read(
            tmp_path,
            f"extends: {example.FILE}\nprefill: {{p2: null}}\nssh: null\n"
            "hosts: {b: 10.0.0.9}\ncontainer: {devices: [/dev/x]}\n",
        )
        assert list(found.prefill) == ["p0", "p1"]
        assert found.ssh.credentials is None
        assert [h.address for h in found.hosts.values()] == ["10.0.0.1", "10.0.0.9"]
        assert found.container.devices == ("/dev/x",)

    def test_merge_key_may_be_overridden(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
        assert yaml_files.read(path)["b"] == {"x": 3, "y": 2}

    def test_image_given_at_the_call_replaces_the_files(self) -> None:
        assert load_deployment(example.FILE, image="other:1").image == "other:1"

    @pytest.mark.parametrize(
        ("changes", "repository"),
        [
            ("", "swr.cn-east-4.myhuaweicloud.com/omni-ci/daily_omniinfer"),
            ("update: {family: daily, repository: omni/daily}", "omni/daily"),
            ("image: 10.0.0.9:5000/omni@sha256:" + "0" * 64, "10.0.0.9:5000/omni"),
        ],
    )
    def test_a_tag_alone_is_one_of_the_files_repository(
        self, tmp_path: Path, changes: str, repository: str
    ) -> None:
        path = tmp_path / "x.yaml"
        path.write_text(f"extends: {example.FILE}\n{changes}\n")
        assert load_deployment(path, image="20250723_1").image == f"{repository}:20250723_1"

    def test_a_tag_alone_is_none_where_the_file_has_an_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_text(f"extends: {example.FILE}\nimage: file:/data/omni.tar\n")
        with pytest.raises(InvalidInput, match="expected an image with a tag or a digest"):
            load_deployment(path, image="20250723_1")


# changes to the example → the problems they must give, as `key: start of message`
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"name": "Bad Name"}, ["name: expected lowercase letters, digits and '-' (at most 40, "]),
    ({"name": "x" * 41}, ["name: expected lowercase letters"]),
    ({"name": 5}, ["name: expected lowercase letters"]),
    ({"name": "a\n"}, ["name: expected lowercase letters"]),
    ({"name": None, "image": None}, ["name: is missing", "image: is missing"]),
    ({"engine": "vlm"}, ["engine: expected 'omniinfer', 'sglang' or 'vllm', found 'vlm'"]),
    ({"pull": "maybe"}, ["pull: expected 'always' or 'never', found 'maybe'"]),
    *(
        ({"image": odd}, ["image: expected an image with a tag or a digest, NAME:TAG, NAME@"])
        for odd in ("a b", ["a"], "", "omni", "host:5000/omni", ":x", "omni:", "omni@sha256:0")
    ),
    ({"smok": {}}, ["smok: is not a known key; did you mean smoke?"]),
    ({"model": {"pth": 1}}, ["model.pth: is not a known key; did you mean path?"]),
    (
        {"prefill": {"p0": {"devics": 1}}},
        ["prefill.p0.devics: is not a known key; did you mean devices?"],
    ),
    (
        {"container": {"names": {"prefil": "x"}}},
        ["container.names.prefil: is not a known key; did you mean prefill?"],
    ),
    ({"ssh": {"password": "s3cret"}}, ["ssh.password: is not a known key; expected user, port"]),
    ({"profile_settings": {}}, ["profile_settings: is not a key of a deployment file"]),
    ({"model": "x"}, ["model: expected a mapping, found 'x'"]),
    ({"model": {"max_len_prefill": "9"}}, ["model.max_len_prefill: expected a whole number"]),
    ({"model": {"max_len_prefill": True}}, ["model.max_len_prefill: expected a whole number"]),
    ({"model": {"max_len_decode": 0}}, ["model.max_len_decode: expected more than 0, found 0"]),
    ({"model": {"path": "models"}}, ["model.path: expected an absolute path"]),
    ({"model": {"served_name": ""}}, ["model.served_name: expected text, not empty"]),
    ({"model": {"served_name": "a\nb"}}, ["model.served_name: expected text, not empty"]),
    ({"hosts": {"a": "::1"}}, ["hosts.a.address: expected an IPv4 address"]),
    ({"hosts": {"a": "node-1.example"}}, ["hosts.a.address: expected an IPv4 address"]),
    ({"hosts": {"a": "10.0.0.1 "}}, ["hosts.a.address: expected an IPv4 address"]),
    ({"hosts": {"a": "010.0.0.1"}}, ["hosts.a.address: expected an IPv4 address"]),
    *(
        (
            {"hosts": {"a": address}},
            [
                "hosts.a.address: expected the address at which the other hosts reach this one, "
                f"found {address}, which {what}"
            ],
        )
        for address, what in (
            ("0.0.0.0", "is not an address of a machine"),
            ("0.1.2.3", "is not an address of a machine"),
            ("127.0.0.1", "is a machine's own loopback, which no other machine can reach"),
            ("127.255.255.254", "is a machine's own loopback"),
            ("224.0.0.1", "is a multicast address"),
            ("239.255.255.255", "is a multicast address"),
            ("240.0.0.1", "is reserved"),
            ("255.255.255.254", "is reserved"),
            ("255.255.255.255", "is the broadcast address"),
        )
    ),
    ({"hosts": {"a": 5}}, ["hosts.a: expected a mapping, found 5"]),
    ({"hosts": {"A b": "10.0.0.3"}}, ["hosts.A b: expected lowercase letters"]),
    ({"hosts": {1: "10.0.0.3"}}, ["hosts.1: expected lowercase letters"]),
    ({"hosts": []}, ["hosts: expected a mapping, found []"]),
    ({"prefill": {"p0": {"devices": "0-7,7"}}}, ["prefill.p0.devices: expected each device once"]),
    ({"proxy": {"c0": {"port": 80}}}, ["proxy.c0.port: expected at least 1024, found 80"]),
    ({"proxy": {"c0": {"port": "7000"}}}, ["proxy.c0.port: expected a whole number"]),
    ({"proxy": {"c0": None}}, ["proxy: expected at least 1 entry, found {}"]),
    (
        {"proxy": {"c1": {"host": "a"}}},
        ["proxy.c1: expected the port of proxy c1 not to be 7000, which on host a is the port of"],
    ),
    (
        {"proxy": {"c1": {"host": "b", "hold": 20}}},
        ["proxy: expected the same values for all proxies, because"],
    ),
    ({"proxy": {"c1": {"host": "z"}}}, ["proxy.c1.host: expected one of the file's hosts"]),
    (
        {"proxy": {"c0": {"host": "z"}}},
        ["proxy.c0.host: expected one of the file's hosts (a, b), found z"],
    ),
    (
        {"prefill": {"p0": {"host": "y"}, "p1": {"host": "z"}}},
        [
            "prefill.p0.host: expected one of the file's hosts (a, b)",
            "prefill.p1.host: expected one of the file's hosts (a, b)",
        ],
    ),
    ({"container": {"shm_size": "5x"}}, ["container.shm_size: expected a size such as 500g"]),
    ({"container": {"shm_size": True}}, ["container.shm_size: expected a size such as 500g"]),
    ({"container": {"privileged": "so"}}, ["container.privileged: expected true or false"]),
    ({"container": {"time_zone": "../x"}}, ["container.time_zone: expected a time zone such as"]),
    ({"container": {"mounts": "/data"}}, ["container.mounts: expected a list, found '/data'"]),
    (
        {"container": {"mounts": ["/a:/b:xx", 5, "/a:..", {"source": "/a"}]}},
        [
            "container.mounts.0: expected SOURCE[:TARGET][:ro], found '/a:/b:xx'",
            "container.mounts.1: expected a mapping, found 5",
            "container.mounts.2.target: expected an absolute path",
            "container.mounts.3.target: is missing",
        ],
    ),
    ({"paths": {"state": "/a/../b"}}, ["paths.state: expected an absolute path without '..'"]),
    ({"paths": {"logs": "/"}}, ["paths.logs: expected an absolute path"]),
    ({"code": "src"}, ["code: expected `image` (the code in the image), an absolute path on"]),
    ({"code": {"sorce": "x"}}, ["code.source: is missing", "code.sorce: is not a known key; did"]),
    *(
        ({"code": {"source": url}}, [f"code.source: expected {says}"])
        for url, says in (
            (f"https://u:p@h/x@{'a' * 40}", "a URL without user and password, for which git"),
            (f"https://token@h/x@{'a' * 40}", "a URL without user and password, for which git"),
            (f"ssh://git:p@h/x@{'a' * 40}", "a URL without user and password, for which git"),
            ("u:p@h:x.git", "a URL without user and password, for which git"),
            ("git@h:x.git@main", "URL@COMMIT with all 40 digits of the commit, found"),
            (f"ftp://h/x@{'a' * 40}", "a URL by http, https, ssh, git or file, found"),
        )
    ),
    ({"code": "/a/"}, ["code: expected an absolute path without '..' or a trailing '/'"]),
    ({"gates": {"ready": 0}}, ["gates.ready: expected more than 0"]),
    ({"gates": {"ready": float("inf")}}, ["gates.ready: expected at most 86400"]),
    ({"gates": {"ready": 10**400}}, ["gates.ready: expected "]),
    ({"settings": {"proxy": {}}}, ["settings.proxy: expected 'all', 'prefill' or 'decode'"]),
    (
        {"settings": {"all": {"environment": {"A-B": 1, "X": [1], "Z": "a\0b"}}}},
        [
            "settings.all.environment.A-B: expected letters, digits and '_'",
            "settings.all.environment.X: expected text, a number, true or false, found [1]",
            "settings.all.environment.Z: expected text without NUL characters",
        ],
    ),
    (
        {"settings": {"all": {"arguments": {"--x": 1}}}},
        ["settings.all.arguments.--x: expected an option without its leading dashes"],
    ),
    (
        {"settings": {"decode": {"additional_config": yaml.safe_load("{a: 2024-01-01}")}}},
        ["settings.decode.additional_config: expected values that JSON can hold"],
    ),
    (
        {"settings": {"all": {"gpu_memory_utilization": 1.5}}},
        ["settings.all.gpu_memory_utilization: expected at most 1"],
    ),
    *(
        ({"prefill": {"p0": odd}}, [f"prefill.p0{message}"])
        for odd, message in (
            ({"hosts": ["a"]}, ": expected either `host` or `hosts`, found both"),
            ({"host": None}, ": expected either `host` or `hosts`, found neither"),
            ({"host": None, "hosts": []}, ".hosts: expected at least 1 entry"),
            ({"host": None, "hosts": "ab"}, ".hosts: expected a list, found 'ab'"),
            (
                {"host": None, "hosts": ["a", "a"]},
                ": expected each host once, found a more than once",
            ),
            (
                {"host": None, "hosts": ["a", "z"]},
                ".hosts: expected one of the file's hosts (a, b), found z",
            ),
            (
                {"devices": {"b": "0-7"}},
                ": expected devices for its hosts (a), found devices for b",
            ),
            ({"devices": {}}, ": expected devices for its hosts (a), found devices for none"),
            ({"devices": {1: "0-7"}}, ".devices: expected hosts of the file, found 1"),
            ({"devices": {"a": "7-0"}}, ".devices: expected a range that runs upwards, 0-7"),
            ({"container_devices": ["x"]}, ".container_devices.0: expected an absolute path"),
        )
    ),
    *(
        (
            {"kv_parallel_size": odd},
            ["kv_parallel_size: expected by-image, prefill-pods-plus-one, "],
        )
        for odd in ("x", 0, True, 1.5)
    ),
    *(
        (
            {"decode_engine_id": odd},
            ["decode_engine_id: expected kv-rank or a number of at least 0, "],
        )
        for odd in ("x", -1, True, 1.5)
    ),
    ({"upstream_source": "x"}, ["upstream_source: is not a key of a deployment file"]),
    ({"supports": {"multi_host_prefill": "yes"}}, ["supports.multi_host_prefill: expected 'none'"]),
    ({"allow": "batched-tokens"}, ["allow: expected a list, found 'batched-tokens'"]),
    ({"compat": "x"}, ["compat: expected 'upstream', found 'x'"]),
    ({"compat": "upstream", "allow": [5]}, ["allow.0: expected the name of a rule, found 5; "]),
    ({"upstream": {}, "all": {}}, ["all: is not a key of a", "upstream: is not a key of a"]),
    ({"container": {"names": {"proxy": "a b"}}}, ["container.names.proxy: expected letters, "]),
    (
        {"smoke": {"max_tokens": "x"}, "smok": 1, "http_proxy": ""},
        [
            "http_proxy: expected text without spaces",
            "smoke.max_tokens: expected a whole number, found 'x'",
            "smok: is not a known key; did you mean smoke?",
        ],
    ),
]


@pytest.mark.parametrize(("changes", "expected"), BAD, ids=[str(bad)[:60] for bad, _ in BAD])
def test_all_problems_are_named_by_key(changes: dict[str, Any], expected: list[str]) -> None:
    problems = list(map(str, refused(changes).problems))
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize(
    "changes",
    [
        {"http_proxy": "http://user:hunter2@proxy.example:3128"},
        {"http_proxy": "user:hunter2@proxy.example:3128"},
        {"http_proxy": "http://hunter2@proxy.example"},
        {"http_proxy": "http://user:hunter2@proxy.example\n"},
        {"registry": {"host": "user:hunter2@registry.example"}},
        {"settings": {"all": {"environment": {"HTTPS_PROXY": "http://u:hunter2@proxy.example"}}}},
        {"ssh": {"password": "hunter2"}},
    ],
    ids=str,
)
def test_secret_in_the_file_is_refused_and_never_repeated(changes: dict[str, Any]) -> None:
    error = refused(changes)
    assert len(error.problems) == 1
    for each in (error, error.__cause__):
        assert "hunter2" not in f"{each}{each!r}"


@pytest.mark.parametrize("proxy", ["http://proxy.example:3128", "proxy.example:3128", None])
def test_proxy_without_login_is_accepted(proxy: str | None) -> None:
    assert example.service({"http_proxy": proxy}).http_proxy == proxy


@pytest.mark.parametrize(
    "address", ["1.0.0.1", "10.0.0.9", "126.255.255.255", "128.0.0.1", "169.254.1.1", "223.1.1.1"]
)
def test_any_address_that_a_machine_can_have_is_accepted(address: str) -> None:
    assert example.service({"hosts": {"a": address}}).hosts["a"].address == address


@pytest.mark.parametrize(
    ("given_", "devices"),
    [
        ("0-7", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("0,2,4-6", (0, 2, 4, 5, 6)),
        ("9, 8", (9, 8)),
        (3, (3,)),
        ([0, "1-2"], (0, 1, 2)),
        ("63", (63,)),
    ],
)
def test_device_lists(given_: object, devices: tuple[int, ...]) -> None:
    assert parse_devices(given_) == devices


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ("0-7,7", "expected each device once, found 7 more than once"),
        ("7-0", "expected a range that runs upwards, 0-7, found '7-0'"),
        *((odd, "expected device ids such as") for odd in ("a-b", "", "0-7,", "²", "-1", "0--1")),
        *((odd, "expected device ids such as") for odd in (True, [True], None, 1.5, {"a": 1})),
        (10**30, "expected device ids such as"),
        ("99999999999", "expected device ids such as"),
        ("0-9999", "expected device ids below 64, found 9999"),
        ([], "expected at least one device"),
    ],
)
def test_device_lists_that_are_refused(given_: object, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_devices(given_)


@pytest.mark.parametrize(
    ("given_", "size"), [("500g", 500 << 30), ("64M", 64 << 20), ("2kb", 2048), (1024, 1024)]
)
def test_sizes(given_: object, size: int) -> None:
    assert parse_size(given_) == size


@pytest.mark.parametrize(
    ("given_", "mount"),
    [
        ("/a", ("/a", "/a", False)),
        ("/a:ro", ("/a", "/a", True)),
        ("/a:/b", ("/a", "/b", False)),
        ("/a:/b:ro", ("/a", "/b", True)),
        ({"source": "/a", "target": "/b"}, ("/a", "/b", False)),
    ],
)
def test_mounts(given_: object, mount: tuple[str, str, bool]) -> None:
    (found,) = example.service({"container": {"mounts": [given_]}}).container.mounts
    assert (found.source, found.target, found.read_only) == mount


@pytest.mark.parametrize(
    "image",
    ["a:1", "host:5000/a/b:1.2_3-x", "a@sha256:" + "0" * 64, "h:5000/a:1@sha256:" + "0" * 64],
)
def test_images(image: str) -> None:
    assert example.service({"image": image}).image == image


@pytest.mark.parametrize(
    ("host", "reference"),
    [
        (None, "swr.cn-east-4.myhuaweicloud.com/omni-ci/daily_omniinfer:20250722_26"),
        ("10.0.0.9:5000", "10.0.0.9:5000/omni-ci/daily_omniinfer:20250722_26"),
    ],
)
def test_registry_replaces_the_images_own(host: str | None, reference: str) -> None:
    assert example.service({"registry": {"host": host}}).image_reference == reference


def test_settings_come_from_profile_then_file_then_instance() -> None:
    of = example.service(
        {
            "settings": {"prefill": {"environment": {"A": 1, "B": 1}, "arguments": {"x": 1}}},
            "prefill": {"p1": {"environment": {"B": 2}, "gpu_memory_utilization": 0.5}},
        }
    )
    p0, p1 = (of.settings_of("prefill", of.prefill[name]) for name in ("p0", "p1"))
    assert (p0.environment["A"], p0.environment["B"], p0.gpu_memory_utilization) == (1, 1, 0.65)
    assert (p1.environment["A"], p1.environment["B"], p1.gpu_memory_utilization) == (1, 2, 0.5)
    assert p1.arguments["x"] == 1
    assert p1.arguments["enforce-eager"] is True


KEYS = sorted(Deployment.model_fields)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(),
    st.sampled_from(["a", "b", "0-7", "10.0.0.1", "/data", "500g", "image", 10**400]),
)  # fmt: skip
NAMES = st.sampled_from(
    [*KEYS, "a", "p0", "d0", "c0", "host", "devices", "all", "environment", "extends", "<<"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(NAMES, st.integers(), st.text(max_size=3)), inner, max_size=4),
    ),
    max_leaves=12,
)
FEW = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@FEW
@given(changes=st.dictionaries(NAMES, VALUES, max_size=5), complete=st.booleans())
def test_any_document_is_a_deployment_or_invalid_input(
    changes: dict[str, Any], complete: bool
) -> None:
    try:
        placement.build(parse_deployment(example.document(changes) if complete else changes))
    except InvalidInput:
        return


@FEW
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.text("a:-[]{}&*!<>|%@`'\"#,? \n\t01", max_size=40),
        VALUES.map(lambda value: yaml.dump(value, allow_unicode=True)),
    )
)
def test_any_text_is_a_deployment_or_invalid_input(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InvalidInput):
        load_deployment(path)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("a:1", ("a", "1", "")),
        ("host:5000/a/b:20250722_26", ("host:5000/a/b", "20250722_26", "")),
        ("host:5000/a@sha256:0", ("host:5000/a", "", "sha256:0")),
        ("h:5000/a:20250722_26@sha256:0", ("h:5000/a", "20250722_26", "sha256:0")),
    ],
)
def test_an_image_is_taken_apart(image: str, parts: tuple[str, str, str]) -> None:
    assert split_image(image) == parts


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0755", "493"), ("0x10", "16"), ("1_000", "1000"), ("12:30:00", "45000"),
        ("1:30.5", "90.5"), ("2025-07-22", "a date"), ("no", "false"), ("On", "true"),
    ],
)  # fmt: skip
def test_what_yaml_reads_as_something_else_is_refused(
    tmp_path: Path, written: str, read: str
) -> None:
    """Wherever it stands, with its line, and with the way to write it."""
    file = tmp_path / "file.yaml"
    for key in ("served_name", "any: [1, {key"):
        closing = "}]" if "{" in key else ""
        file.write_text(f"name: x\n{key}: {written}{closing}\n")
        with pytest.raises(InvalidInput) as caught:
            yaml_files.read(file)
        (problem,) = caught.value.problems
        assert problem.message.startswith(f"line 2: expected text in quotes ('{written}')")
        assert problem.message.endswith(read)
        file.write_text(f"name: x\n{key}: '{written}'{closing}\n")
        assert written in str(yaml_files.read(file))


@pytest.mark.parametrize("written", ["1.10", "1.50e+3", ".5", "100000000000000000000.0"])
def test_a_number_that_would_be_given_on_as_another_text_is_refused(
    tmp_path: Path, written: str
) -> None:
    file = tmp_path / "file.yaml"
    for place in ("environment: {VERSION", "arguments: {version"):
        text = f"extends: {example.FILE}\nsettings: {{all: {{{place}: %s}}}}}}\n"
        file.write_text(text % written)
        with pytest.raises(
            InvalidInput, match=rf"expected text in quotes \('{re.escape(written)}'"
        ):
            load_deployment(file)
        for accepted in (f"'{written}'", "1.5", "-3", "true"):
            file.write_text(text % accepted)
            load_deployment(file)
    file.write_text(
        f"extends: {example.FILE}\nsettings: {{all: {{gpu_memory_utilization: 0.90}}}}\n"
    )
    load_deployment(file)


ALIASES = "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{k}: *a{n - 1}' for k in range(9))}}}\n" for n in range(1, 12)
)
MERGES = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize("bomb", [ALIASES, MERGES], ids=["aliases", "merges"])
@pytest.mark.parametrize("used", ["extends: *a11", "<<: *a11", "image: *a11", "{0}: {{1: *a11}}"])
def test_aliases_of_aliases_are_refused_at_once(tmp_path: Path, bomb: str, used: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"a0: &a0 {{x: y}}\n{bomb}{used}\n")
    with pytest.raises(InvalidInput, match=r"its aliases stand for .* values"):
        load_deployment(file)


@pytest.mark.parametrize("written", ["!!int x", "1" + "0" * 5000, "!!float ''", "!!bool maybe"])
def test_a_value_that_is_none_of_its_kind_is_named_with_its_line(
    tmp_path: Path, written: str
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"name: x\nany: {{a: [{written}]}}\n")
    with pytest.raises(InvalidInput, match="not valid YAML: line 2: "):
        load_deployment(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_file_in_a_closed_directory_is_told(tmp_path: Path) -> None:
    """As a user who may not look into it."""
    closed = Path(tempfile.mkdtemp())
    closed.chmod(0)
    script = (
        "import sys; from pathlib import Path; from pd_deploy.config.load import load_deployment\n"
        "from pd_deploy.errors import InvalidInput\n"
        "import os; os.setuid(65534)\n"
        "try: load_deployment(Path(sys.argv[1]))\n"
        "except InvalidInput as error: print(error)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(closed / "file.yaml")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.stderr, "cannot be read: Permission denied" in done.stdout) == ("", True)
    finally:
        closed.chmod(0o700)
        closed.rmdir()
