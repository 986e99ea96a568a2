"""What breaks a rule is refused by its name, wherever it comes from, unless the file allows it."""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pd_deploy.config.load import load_deployment, profiles
from pd_deploy.config.rule_names import RULES
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.errors import InvalidInput
from pd_deploy.planning import placement
from tests.unit import example

DEEPSEEK = {"profile": "deepseek-r1-a3-2p1d"}
D_ON_BOTH = {"host": None, "hosts": ["b", "a"], "devices": {"a": "8-15", "b": "8-15"}}
# Several copies of the model: decode has the first devices of its hosts, prefills the others.
COPIES = DEEPSEEK | {
    "prefill": {"p0": {"devices": "8-15"}, "p1": None, "p2": None},
    "decode": {"d0": {"host": None, "hosts": ["b", "a"], "devices": "0-7"}},
}
# Rule → changes to the example that break it and no other.
BREAKING: dict[str, list[dict[str, Any]]] = {
    "no-key-in-file": [
        {"settings": {"all": {"environment": {"VLLM_API_KEY": "x"}}}},
        {"settings": {"decode": {"arguments": {"api-key": "x"}}}},
        {"proxy": {"c0": {"environment": {"ROUTER_API_KEY": "x"}}}},
    ],
    "paths-apart": [
        {"paths": {"logs": "/var/lib/pd-deploy"}},
        {"paths": {"state": "/data/log_path"}},
    ],
    "benchmark-length": [{"gates": {"benchmark": {"input_length": 1_000_000}}}],
    "batched-tokens": [
        {place: {where: {"arguments": {"max-num-batched-tokens": 1000}}}}
        for place, where in (("settings", "all"), ("settings", "decode"), ("prefill", "p1"))
    ],
    "code-path": [{"code": {"source": "/x", "path": "/opt/omni"}}],
    "contract-of-image": [
        {"contract": "v0"},
        {"contract": "roles"},
        {"image": "omni:release_1.2.0", "contract": "v0-early"},
    ],
    "decode-devices": [
        COPIES
        | {
            "prefill": COPIES["prefill"] | {"p0": {"devices": "0-7"}},
            "decode": {"d0": D_ON_BOTH},
        },
        *(
            COPIES | {"decode": {"d0": COPIES["decode"]["d0"] | {"devices": devices}}}
            for devices in (
                {"a": "0-7", "b": "1-8"},
                {"a": "0-7", "b": "7,0-6"},
            )
        ),
        # On one host, of two devices each.
        DEEPSEEK | {"decode": {"d0": {"tensor_parallel": 2}}},
    ],
    "decode-gear-list": [
        {"settings": {"decode": {"additional_config": {"decode_gear_list": [64]}}}},
        {
            "decode": {
                "d0": {
                    "additional_config": {
                        "graph_model_compile_config": {"decode_gear_list": list(range(1, 8))}
                    }
                }
            }
        },
    ],
    "derived-arguments": [
        {"settings": {"prefill": {"arguments": {"tensor-parallel-size": 4}}}},
        {"prefill": {"p0": {"arguments": {"kv_transfer_config": "x"}}}},
        {"proxy": {"c0": {"arguments": {"listen-port": 1}}}},
        {"proxy": {"c0": {"arguments": {"prefill_servers_list": "x"}}}},
    ],
    "derived-environment": [
        {"settings": {"all": {"environment": {"PREFILL_POD_NUM": 2}}}},
        {"decode": {"d0": {"environment": {"ASCEND_RT_VISIBLE_DEVICES": "0"}}}},
        {"decode": {"d0": {"environment": {"SERVER_OFFSET": 8}}}},
        {"prefill": {"p0": {"environment": {"VLLM_HOST_IP": "10.0.0.1"}}}},
        {"proxy": {"c0": {"environment": {"http_proxy": "x"}}}},
    ],
    "device-ids": [{"devices_per_host": 15, "prefill": {"p1": None}}],
    "devices-disjoint": [{"prefill": {"p1": {"devices": "7-14"}}}],
    "engine-keys": [{"vllm": {"device": "npu", "connector": "NixlConnector"}}],
    "equal-devices": [
        DEEPSEEK
        | {
            "prefill": {"p0": {"devices": "8-15"}, "p1": None, "p2": None},
            "decode": {"d0": D_ON_BOTH | {"devices": {"a": "0-7", "b": "0-3"}}},
        }
    ],
    "host-addresses": [{"hosts": {"c": "10.0.0.1"}}],
    "kv-layout": [],  # of engine sglang: tests/unit/test_sglang.py
    "kv-parallel-size": [
        {"kv_parallel_size": "decode-tensor-parallel"},
        {"kv_parallel_size": 5},
        {"image": "omni:20250813_1", "kv_parallel_size": "prefill-pods-plus-one"},
    ],
    "mount-targets": [
        {"prefill": {"p0": {"mounts": ["/x:/data/models/QwQ-32B"]}}},
        {"settings": {"decode": {"mounts": ["/x:/var/lib/pd-deploy/qwq-3p1d/x"]}}},
        {"container": {"mounts": ["/etc/localtime"]}},
    ],
    "multi-host-decode": [{"prefill": {"p1": None}, "decode": {"d0": D_ON_BOTH}}],
    "multi-host-prefill": [
        {
            "prefill": {
                "p0": {"host": None, "hosts": ["a", "b"], "devices": "0-3"},
                "p1": None,
                "p2": None,
            }
        }
    ],
    "one-decode-pod": [
        {"prefill": {"p2": None}, "decode": {"d1": {"host": "b", "devices": "0-7"}}}
    ],
    "ports-distinct": [{"proxy": {"c0": {"port": 9000}}}, {"ports": {"api": 8001}}],
    "ports-in-range": [{"ports": {"zmq": 65500}}, {"ports": {"decode_offset": 2}}],
    "prefill-pods": [
        {
            "hosts": {f"h{i}": f"10.0.1.{i}" for i in range(1, 34)},
            "prefill": {f"x{i}": {"host": f"h{i}", "devices": "0-7"} for i in range(1, 34)},
        }
    ],
    "prefill-sizes": [
        DEEPSEEK
        | {
            "prefill": {"p0": {"devices": "0-3"}},
            "decode": {"d0": {"tensor_parallel": 4, "devices": "8-11"}},
        },
        COPIES
        | {
            "prefill": COPIES["prefill"] | {"p1": {"host": "b", "devices": "8-11"}},
        },
    ],
    "prefix-aware": [{"proxy": {"c0": {"prefix_aware": True}}}],
    "proxy-program": [{"proxy": {"c0": {"program": "omni"}}}],
    "recompute-scheduler": [],  # of engine vllm: tests/unit/test_vllm.py
    "tensor-parallel": [
        DEEPSEEK | {"decode": {"d0": {"tensor_parallel": 3}}, "prefill": {
            name: {"devices": devices} for name, devices in
            (("p0", "0-5"), ("p1", "8-13"), ("p2", "0-5"))}},
    ],
    "tensor-parallel-ratio": [
        {"prefill": {"p0": {"devices": "0-3"}}},
        {"decode": {"d0": {"tensor_parallel": 4}}},
        DEEPSEEK
        | {"prefill": {"p0": {"devices": "0-3"}}, "decode": {"d0": {"tensor_parallel": 8}}},
    ],
    "transfer-backend": [],  # the same
    "values-without-blanks": [{"settings": {"all": {"arguments": {"x": "a b"}}}}],
}  # fmt: skip
CASES = [(rule, changes) for rule, several in BREAKING.items() for changes in several]


def broken(changes: dict[str, Any]) -> set[str]:
    """Names of the rules that the example with these changes breaks."""
    try:
        example.place(changes)
    except InvalidInput as error:
        return {problem.message.rpartition("(rule ")[2][:-1] for problem in error.problems}
    return set()


def test_a_refusal_says_how_to_go_on_if_it_is_meant() -> None:
    with pytest.raises(InvalidInput, match=r"allow: \[RULE\]"):
        example.place({"proxy": {"c0": {"port": 9000}}})


def test_every_rule_is_tried() -> None:
    # A tree has to be read for the one, an image to be asked for the other: see test_own_code and
    # test_sglang.
    assert set(BREAKING) == set(RULES) - {"code-commit", "image-options"}


@pytest.mark.parametrize(("rule", "changes"), CASES, ids=[f"{r} {c}"[:70] for r, c in CASES])
def test_a_rule_is_refused_by_name_unless_the_file_allows_it(
    rule: str, changes: dict[str, Any]
) -> None:
    found = broken(changes)
    assert rule in found
    assert rule not in broken({**changes, "allow": [rule]})
    assert broken({**changes, "allow": sorted(found)}) == set()
    others = sorted(set(RULES) - {rule})
    assert broken({**changes, "allow": others}) == {rule}


def test_every_pod_is_a_multiple_of_decode_and_never_less() -> None:
    """Also where the profile does not want them equal."""
    prefill = {"p0": {"devices": "0-3"}, "p1": {"devices": "8-11"}, "p2": None}
    found = [
        broken(
            DEEPSEEK
            | {
                "prefill": prefill,
                "decode": {"d0": {"devices": "0-7", "tensor_parallel": size}},
            }
        )
        for size in (4, 8)
    ]
    assert found == [set(), {"tensor-parallel-ratio"}]


def test_one_copy_of_decode_may_have_any_devices_and_several_only_the_first() -> None:
    wide = {"decode": {"d0": {"devices": "11,8,10,9", "tensor_parallel": 4}}}
    few = {"prefill": {"p0": {"devices": "0-3"}, "p1": {"devices": "4-7"}, "p2": None}}
    assert broken(DEEPSEEK | few | wide) == set()
    with pytest.raises(InvalidInput) as caught:
        example.place(DEEPSEEK | few | {"decode": {"d0": {"tensor_parallel": 4}}})
    (problem,) = caught.value.problems
    assert str(problem).startswith(
        "decode.d0.devices: expected 0-7 in this order, found 8,9,10,11,12,13,14,15 on b: with "
        "several copies of the model (2) the engine counts decode's devices from 0 on each host"
    )
    assert "put a prefill on the other devices" in str(problem)


def test_prefills_of_other_sizes_are_all_named() -> None:
    sizes = {"p0": "0-7", "p1": "8-11", "p2": "8-9"}
    with pytest.raises(InvalidInput) as caught:
        example.place(
            DEEPSEEK
            | {
                "prefill": {name: {"devices": devices} for name, devices in sizes.items()},
                "decode": {"d0": {"devices": "0-7"}},
            }
        )
    said = list(map(str, caught.value.problems))
    assert [text.partition(": the engine")[0] for text in said] == [
        "prefill.p1.devices: expected as many devices as p0 has (8), found 4",
        "prefill.p2.devices: expected as many devices as p0 has (8), found 2",
    ]


def test_an_unknown_rule_gets_its_nearest_name() -> None:
    with pytest.raises(InvalidInput) as caught:
        example.service({"allow": ["batched-token"]})
    (problem,) = caught.value.problems
    assert str(problem).startswith("allow.0: expected the name of a rule, found 'batched-token'; ")
    assert "did you mean batched-tokens?" in str(problem)


def test_compat_allows_itself_what_upstream_breaks_and_the_file_may_allow_more() -> None:
    assert broken({"compat": "upstream"}) == set()
    more = {"compat": "upstream", "proxy": {"c0": {"port": 9000}}, "allow": ["ports-distinct"]}
    assert broken(more) == set()
    assert broken({**more, "allow": []}) == {"ports-distinct"}


class TestOverrides:
    """Environment, arguments, mounts and container devices: deployment, role, instance."""

    CHANGES: ClassVar[dict[str, Any]] = {
        "settings": {
            "all": {
                "environment": {"A": "all", "B": "all", "C": "all"},
                "arguments": {"seed": 1, "swap-space": 1, "max-num-seqs": 1},
                "mounts": ["/m/all", "/m/x:/x"],
                "container_devices": ["/dev/all"],
            },
            "prefill": {
                "environment": {"B": "role", "C": "role"},
                "arguments": {"swap-space": 2, "max-num-seqs": 2},
                "mounts": ["/m/role", "/m/y:/x:ro"],
                "container_devices": ["/dev/role"],
            },
        },
        "prefill": {
            "p0": {
                "environment": {"C": "instance"},
                "arguments": {"max-num-seqs": 3},
                "mounts": ["/m/instance:/data"],
                "container_devices": ["/dev/instance"],
            }
        },
    }

    @pytest.mark.parametrize(
        ("name", "environment", "arguments"),
        [
            ("p0", ["all", "role", "instance"], ["1", "2", "3"]),
            ("p1", ["all", "role", "role"], ["1", "2", "2"]),
            ("d0", ["all", "all", "all"], ["1", "1", "1"]),
        ],
    )
    def test_the_nearest_level_wins(
        self, name: str, environment: list[str], arguments: list[str]
    ) -> None:
        service = example.for_engine(self.CHANGES)
        found = omniinfer.environment(service, name)
        assert [found[key] for key in "ABC"] == environment
        argv = omniinfer.command(service, name)
        extra = argv[argv.index("--extra-args") + 1].split()
        options = ("--seed", "--swap-space", "--max-num-seqs")
        assert [extra[extra.index(option) + 1] for option in options] == arguments

    def test_mounts_and_devices_add_up_and_the_last_of_a_target_stays(self) -> None:
        service = example.for_engine(self.CHANGES)
        mounts = {
            name: {m.target: (m.source, m.read_only) for m in spec.mounts}
            for name, spec in (
                (n, omniinfer.container(service, n)) for n in ("p0", "p1", "d0", "c0")
            )
        }
        assert mounts["p0"]["/data"] == ("/m/instance", False)
        assert mounts["p1"]["/data"] == ("/data", False)
        assert mounts["p0"]["/x"] == mounts["p1"]["/x"] == ("/m/y", True)
        assert mounts["d0"]["/x"] == ("/m/x", False)
        assert {"/m/all", "/m/role"} <= mounts["p0"].keys()
        assert not {"/x", "/m/all"} & mounts["c0"].keys()
        devices = {n: omniinfer.container(service, n).devices[3:] for n in ("p0", "p1", "d0", "c0")}
        assert devices == {
            "p0": ("/dev/all", "/dev/role", "/dev/instance"),
            "p1": ("/dev/all", "/dev/role"),
            "d0": ("/dev/all",),
            "c0": (),
        }


class TestProfiles:
    def file(self, directory: Path, profile: str, text: str = "") -> Path:
        (directory / "sub").mkdir()
        (directory / "sub/my.yaml").write_text(text)
        path = directory / "x.yaml"
        path.write_text(f"extends: {example.FILE}\nprofile: {profile}\n")
        return path

    def test_of_ones_own_lies_beside_the_file_and_on_one_that_comes_with_us(
        self, tmp_path: Path
    ) -> None:
        text = "profile: qwq-32b-a3\ndecode: {gpu_memory_utilization: 0.5, arguments: {seed: 7}}\n"
        found = load_deployment(self.file(tmp_path, "sub/my.yaml", text))
        settings = found.settings_of("decode", found.decode["d0"])
        assert (settings.gpu_memory_utilization, settings.arguments["seed"]) == (0.5, 7)
        assert settings.arguments["max-num-batched-tokens"] == 61440
        assert placement.build(found).decode[0].master.settings == settings
        # A file elsewhere that extends it means the same profile.
        other = tmp_path / "sub/other.yaml"
        other.write_text("extends: ../x.yaml\n")
        assert load_deployment(other).profile_settings == found.profile_settings

    def test_of_ones_own_stands_alone(self, tmp_path: Path) -> None:
        text = "engine: omniinfer\nkv_parallel_size: 8\ndevices_per_host: 16\n"
        found = load_deployment(self.file(tmp_path, "./sub/my.yaml", text))
        later = {"image": "omni:20251111_1"}  # decode's tensor parallel size is 8
        service = example.for_engine(later | {"kv_parallel_size": found.kv_parallel_size})
        decode = service.topology.decode[0].master
        assert omniinfer.kv_transfer_config(service, decode)["kv_parallel_size"] == 8
        assert found.settings_of("decode", found.decode["d0"]).arguments == {}

    @pytest.mark.parametrize(
        ("profile", "text", "says"),
        [
            ("./gone.yaml", "", "gone.yaml: cannot be read: No such file"),
            ("./sub/my.yaml", "", "my.yaml: 1 problem\n  expected a mapping"),
            (
                "./sub/my.yaml",
                "profile: ./my.yaml\n",
                "my.yaml: 1 problem\n  line 1: profile: expected one",
            ),
            ("./sub/my.yaml", "devices_per_host: x\n", "devices_per_host: expected a whole number"),
            ("./sub/my.yaml", "prefil: {}\n", "prefil: is not a known key; did you mean prefill?"),
            ("./sub/my.yaml", "all: {x: 1}\n", "sub/my.yaml, line 1: all.x: is not a known key"),
            ("my", "", f"profile: expected one of {', '.join(profiles())}, or"),
            ("[1]", "", f"profile: expected one of {', '.join(profiles())}, or"),
        ],
    )
    def test_that_cannot_be_used_says_why(
        self, tmp_path: Path, profile: str, text: str, says: str
    ) -> None:
        with pytest.raises(InvalidInput) as caught:
            load_deployment(self.file(tmp_path, profile, text))
        assert says in str(caught.value)

    def test_compat_needs_a_profile_that_says_what_upstream_does(self, tmp_path: Path) -> None:
        path = self.file(tmp_path, "./sub/my.yaml", "engine: omniinfer\n")
        path.write_text(path.read_text() + "compat: upstream\n")
        with pytest.raises(
            InvalidInput, match="compat: expected a profile with a section `upstream`"
        ):
            load_deployment(path)

    @pytest.mark.parametrize(
        ("name", "compat"),
        [(name, None) for name in profiles() if name != "omniinfer"]  # it tunes nothing
        + [
            (name, "upstream")
            for name in profiles()
            if name != "omniinfer" and not name.startswith(("sglang-", "vllm-"))
        ],
    )
    def test_that_comes_with_us_has_an_example_that_renders(
        self, name: str, compat: str | None
    ) -> None:
        assert name in examples()
        for path in examples()[name]:
            plan = example.plan_of(path, {"compat": compat})
            assert plan.roles
            assert all(host.instances for host in plan.hosts.values())


@functools.cache
def examples() -> dict[str, list[Path]]:
    """The deployment files that come with us, by their profiles."""
    files = defaultdict(list)
    for path in (example.ROOT / "deployments").glob("*.yaml"):
        files[load_deployment(path).profile].append(path)
    return dict(files)


def test_the_last_port_is_65535() -> None:
    highest = max(
        port
        for instance in example.place({"ports": {"zmq": 60000}}).instances
        for port in instance.ports.values()
    )
    last = 60000 + 65535 - highest
    place = example.place({"ports": {"zmq": last}})
    assert max(port for instance in place.instances for port in instance.ports.values()) == 65535
    with pytest.raises(InvalidInput, match="would be 65536, above 65535"):
        example.place({"ports": {"zmq": last + 1}})
    with pytest.raises(InvalidInput, match=r"ssh\.port: expected .*65535, found 65536"):
        example.service({"ssh": {"port": 65536}})
