"""What images of each age are given: by rendered scripts, arguments and configurations."""

import json
import re
import shlex
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_deploy.config.load import parse_deployment
from pd_deploy.config.models import ContractName
from pd_deploy.config.yaml_files import merge
from pd_deploy.engines.base import HostFacts, Layout, Service
from pd_deploy.engines.omniinfer import contracts
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.engines.omniinfer.contracts import CONTRACTS, contract_of, expected, possible
from pd_deploy.errors import FactsError, InvalidInput
from pd_deploy.planning import placement
from tests.unit import example

NAMES: tuple[ContractName, ...] = get_args(ContractName)
WITH_RANKTABLES, WITHOUT = ("v0-early", "v0"), ("v1", "roles")
UNDATED = "registry.example/omni:silent"
# Four hosts with a pod each: the ports that v1 fixes allow no more of prefills.
SPREAD = {
    "hosts": {name: f"10.0.0.{number}" for number, name in enumerate("abcd", 1)},
    "prefill": {
        name: {"host": host, "devices": "8-15"}
        for name, host in (("p0", "a"), ("p1", "b"), ("p2", "c"))
    },
    "decode": {"d0": {"host": "d", "devices": "8-15"}},
}
SERVERS = ("p0", "p1", "p2", "d0")


def service(contract: str, changes: Mapping[str, Any] | None = None) -> Service:
    """Four pods with an image that only the contract tells anything of."""
    document = example.document(SPREAD | {"image": UNDATED, "contract": contract})
    of = parse_deployment(merge(document, changes or {}))
    layout = Layout.of(of, example.GENERATION)
    return Service(of, placement.build(of), layout, example.facts(of), example.IMAGE)


def arguments(service: Service, name: str) -> dict[str, str | bool]:
    """The options of a launcher or a proxy's script; a flag is true."""
    words = omniinfer.command(service, name)[2:]
    options: dict[str, str | bool] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--") and word not in options.values():
            options[word] = True if after.startswith("--") and " " not in after else after
    return options


def kv_config(service: Service, name: str) -> dict[str, Any]:
    """The KV configuration that the launcher is given."""
    config: dict[str, Any] = json.loads(str(arguments(service, name)["--kv-transfer-config"]))
    return config


class TestOfATag:
    """What a tag tells, and no more."""

    @pytest.mark.parametrize(
        ("tag", "names"),
        [
            ("20250722_26", {"v0-early"}),
            ("20250812_1", {"v0-early"}),
            ("20250813_1", {"v0"}),
            ("release_v0.3.0", {"v0-early"}),
            ("release_v0.4.2_0926_2000", {"v0"}),
            ("release_v0.7.0-202602061150-vllm", {"v0"}),
            ("master-202512022014-vllm", {"v0"}),
            ("master-202601312359-vllm", {"v0"}),
            ("master-202602010000-vllm", {"v0", "v1"}),
            ("master-202607010000-vllm", {"v0", "v1", "roles"}),
            ("release_1.0.0-202603010000-vllm", {"v1"}),
            ("release_1.2.1.post1-202606292354-vllm", {"v1", "roles"}),
            ("release_1.2.1.post1-202607241407-vllm", {"v1", "roles"}),
            ("v1.0.0-vllm", {"v1", "roles"}),
            # It contradicts itself.
            ("release_v0.3.0-20251001-vllm", set(NAMES)),
            ("release_1.0.0-202501010000-vllm", set(NAMES)),
            ("0.0.1", set(NAMES)),
            ("", set(NAMES)),
        ],
    )
    def test_are_the_contracts_that_it_may_have(self, tag: str, names: set[str]) -> None:
        assert possible(tag) == names
        image = f"registry.example/omni:{tag}" if tag else "omni@sha256:" + "0" * 64
        of = example.service({"image": image})
        only = next(iter(names)) if len(names) == 1 else None
        chosen = expected(of)
        assert (chosen.name if chosen else None) == only
        assert contract_of(of).name == (only or "v0")

    @given(st.dates(date(2024, 1, 1), date(2030, 1, 1)))
    def test_of_a_day_never_forgets_what_came_later(self, day: date) -> None:
        def newest(of: date) -> int:
            return max(NAMES.index(name) for name in possible(f"master-{of:%Y%m%d}0000-vllm"))

        assert newest(day) <= newest(day + timedelta(days=1))

    @pytest.mark.parametrize("name", NAMES)
    def test_is_overridden_by_the_file(self, name: ContractName) -> None:
        of = example.service({"image": UNDATED, "contract": name})
        assert expected(of) is CONTRACTS[name]

    @given(st.sampled_from(NAMES), st.sampled_from(["20250722_26", "release_1.0.0", "silent"]))
    def test_is_contradicted_only_by_what_it_rules_out(self, name: ContractName, tag: str) -> None:
        of = example.service({"image": f"omni:{tag}", "contract": name})
        problems = [problem for _, problem in contracts.findings(of)]
        assert bool(problems) is (name not in possible(tag))
        for problem in problems:
            assert problem.key == "contract"
            assert f"has by its age, found {name}" in problem.message


class TestServers:
    @pytest.mark.parametrize("contract", NAMES)
    def test_start_where_the_image_has_its_launcher(self, contract: str) -> None:
        directory = {"roles": "tools/deploy/start_server"}.get(contract, "tools/scripts")
        of = service(contract)
        for name in SERVERS:
            script = omniinfer.start_script(of, name)
            assert f"cd /workspace/omniinfer/{directory} || exit 1" in script
            assert "start_api_servers.py" in script

    @pytest.mark.parametrize("contract", NAMES)
    def test_keep_their_own_devices(self, contract: str) -> None:
        of = service(contract)
        for name in SERVERS:
            environment = omniinfer.environment(of, name)
            assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "8,9,10,11,12,13,14,15"
            told = "--use-inventory-devices" in omniinfer.command(of, name)
            assert told is (contract in WITHOUT)

    @pytest.mark.parametrize("contract", WITHOUT)
    def test_with_several_copies_are_given_a_list_too_wherever_their_devices_are(
        self, contract: str
    ) -> None:
        changes = {
            "profile": "deepseek-r1-a3-2p1d",
            "decode": {"d0": {"tensor_parallel": 2}},
        }
        of = service(contract, changes)
        environment = omniinfer.environment(of, "d0")
        assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "8,9,10,11,12,13,14,15"
        assert "SERVER_OFFSET" not in environment
        assert arguments(of, "d0")["--num-servers"] == "4"

    @pytest.mark.parametrize(("contract", "offset"), [("v0", "4"), ("v1", "8"), ("roles", "8")])
    def test_of_a_second_host_are_counted_as_the_launcher_counts(
        self, contract: str, offset: str
    ) -> None:
        changes = {
            "profile": "deepseek-r1-a3-2p1d",
            "hosts": {"e": "10.0.0.5"},
            "decode": {
                "d0": {"host": None, "hosts": ["d", "e"], "devices": "0-7", "tensor_parallel": 2}
            },
        }
        assert arguments(service(contract, changes), "d0-1")["--server-offset"] == offset
        for unit, number in (("servers", "4"), ("devices", "8")):
            given_ = service(contract, changes | {"supports": {"server_offset": unit}})
            assert arguments(given_, "d0-1")["--server-offset"] == number

    @pytest.mark.parametrize("contract", NAMES)
    def test_start_in_an_order_only_where_all_link_while_loading(self, contract: str) -> None:
        of = service(contract)
        after = {n: omniinfer.starts_after(of.deployment, of.topology, n) for n in SERVERS}
        ordered = ("d0",) if contract in WITH_RANKTABLES else ()
        assert after == {"p0": ordered, "p1": ordered, "p2": ordered, "d0": ()}

    def test_over_hosts_keep_rays_workers_off_the_ports_that_the_engine_binds(self) -> None:
        changes = {
            "profile": "deepseek-r1-a3-2p1d",
            "prefill": {
                "p0": {"host": None, "hosts": ["a", "b"], "devices": "0-15"},
                "p1": None,
                "p2": None,
            },
        }
        of = service("v1", changes)
        for name in ("p0-0", "p0-1"):
            assert "--max-worker-port=15565" in omniinfer.start_script(of, name)
            assert omniinfer.starts_after(of.deployment, of.topology, name) == ()
        assert "worker-port" not in omniinfer.start_script(service("roles", changes), "p0-0")

    @pytest.mark.parametrize(("contract", "last"), [("v0", 19999), ("v1", 15565), ("roles", 19999)])
    def test_over_hosts_leave_the_ports_of_rays_workers_alone(
        self, contract: str, last: int
    ) -> None:
        """Decode is on another host, where there is no ray."""
        changes = {
            "profile": "deepseek-r1-a3-2p1d",
            "prefill": {
                "p0": {"host": None, "hosts": ["a", "b"], "devices": "0-15"},
                "p1": None,
                "p2": None,
            },
            "decode": {"d0": {"devices": "0-7"}},
        }
        for port in (10001, 20000):
            service(contract, changes | {"ports": {"master": port}})
        for port in (10002, last):
            with pytest.raises(InvalidInput) as caught:
                service(contract, changes | {"ports": {"master": port}})
            (problem,) = caught.value.problems
            assert f"outside of 10002 to {last}, where ray's workers" in problem.message


class TestKvTransfer:
    SIZES = {"v0-early": 4, "v0": 8, "v1": 4, "roles": 4}  # noqa: RUF012

    @pytest.mark.parametrize("contract", NAMES)
    def test_is_by_the_connector_of_the_age(self, contract: str) -> None:
        of = service(contract)
        later = contract in WITHOUT
        for name in SERVERS:
            config = kv_config(of, name)
            instance = of.topology.instance(name)
            assert instance is not None
            connector = "LLMDataDistConnector" if later else "AscendHcclConnectorV1"
            assert config["kv_connector"] == connector
            assert config["kv_parallel_size"] == self.SIZES[contract]
            assert config["kv_rank"] == SERVERS.index(name)
            assert config["kv_role"] == ("kv_consumer" if name == "d0" else "kv_producer")
            assert config.get("kv_port") == (instance.zmq_port if later else None)
            assert config.get("kv_load_failure_policy") == ("fail" if later else None)
            assert ("engine_id" in config) is ("kv_buffer_device" in config)
            assert ("engine_id" in config) is (contract != "roles")
            assert "kv_connector_extra_config" not in config

    @pytest.mark.parametrize("contract", NAMES)
    def test_passes_on_what_the_file_gives(self, contract: str) -> None:
        extra = {"kv_producer_dp_size": 1, "nested": {"a b": [1, "x"]}}
        of = service(contract, {"kv_connector_extra_config": extra})
        assert all(kv_config(of, n)["kv_connector_extra_config"] == extra for n in SERVERS)

    @pytest.mark.parametrize("contract", WITHOUT)
    @pytest.mark.parametrize("size", ["prefill-pods-plus-one", "decode-tensor-parallel", 7])
    def test_takes_any_size_that_nothing_reads(self, contract: str, size: str | int) -> None:
        config = kv_config(service(contract, {"kv_parallel_size": size}), "d0")
        assert config["kv_parallel_size"] in (4, 8, 7)


class TestPorts:
    @pytest.mark.parametrize("contract", NAMES)
    def test_are_all_that_workers_bind(self, contract: str) -> None:
        instance = service(contract).topology.instance("p1")
        assert instance is not None
        ports = list(instance.ports.values())
        assert len(ports) == len(set(ports))
        workers = range(8) if contract in WITHOUT else range(1)
        assert set(instance.kv_ports) == {instance.zmq_port + rank for rank in workers}
        fixed = set(range(15566, 15575)) if contract == "v1" else set()
        assert set(ports) == {instance.api_port, instance.master_port} | fixed | set(
            instance.kv_ports
        )

    @pytest.mark.parametrize(("contract", "step"), [("v0", 1), ("v1", 16), ("roles", 16)])
    def test_of_pods_lie_as_far_apart_as_a_host_has_devices(self, contract: str, step: int) -> None:
        topology = service(contract).topology
        ports = [pod.master.zmq_port for pod in topology.pods]
        assert ports == [5568, 5568 + step, 5568 + 2 * step, 5568 + 100 * step]
        given_ = service(contract, {"ports": {"zmq_step": 20}}).topology
        assert given_.pods[1].master.zmq_port == 5588

    def test_of_pods_on_one_host_may_not_overlap(self) -> None:
        """The documented two hosts, with two pods of eight devices each."""
        changes: dict[str, Any] = {"image": UNDATED, "contract": "roles"}
        example.place(changes | {"ports": {"zmq_step": 8}})
        changes |= {"ports": {"zmq_step": 7}}
        with pytest.raises(InvalidInput, match="rule ports-distinct"):
            example.place(changes)

    def test_that_v1_fixes_allow_one_prefill_per_host_unless_the_file_moves_them(self) -> None:
        changes: dict[str, Any] = {"image": UNDATED, "contract": "v1"}
        with pytest.raises(InvalidInput) as caught:
            example.place(changes)
        moved = {"prefill": {"p1": {"environment": {omniinfer.BASE_PORT: 15600}}}}
        ports = example.place(changes | moved).pod_of("p1").master.ports.values()
        assert set(range(15599, 15608)) <= set(ports)
        assert {problem.key for problem in caught.value.problems} == {"prefill.p1"}
        messages = [problem.message for problem in caught.value.problems]
        # It names what moves the port.
        name = f"{omniinfer.BASE_PORT} - 1"
        assert f"its {name} port 15566 on host a is also the {name} port of p0" in messages[0]
        assert all(m.endswith("(rule ports-distinct)") for m in messages)


class TestEnvironment:
    RANKTABLES = (
        "GLOBAL_RANK_TABLE_FILE_PATH",
        "RANK_TABLE_FILE_PATH",
        "LOCAL_DECODE_SERVER_IP_LIST",
        "GLOBAL_DECODE_SERVER_IP_LIST",
        "SERVER_IP_LIST",
    )
    RENAMED = {  # noqa: RUF012
        "ROLE": "OMNI_PD_ROLE",
        "PREFILL_POD_NUM": "OMNI_PD_PREFILL_POD_NUM",
        "DECODE_POD_NUM": "OMNI_PD_DECODE_POD_NUM",
        "VLLM_LLMDATADIST_ZMQ_PORT": "OMNI_LLMDATADIST_ZMQ_PORT",
    }

    @pytest.mark.parametrize("contract", NAMES)
    @pytest.mark.parametrize("name", SERVERS)
    def test_has_both_names_of_what_was_renamed(self, contract: str, name: str) -> None:
        environment = omniinfer.environment(service(contract), name)
        for old, new in self.RENAMED.items():
            assert environment[old]
            assert environment.get(new) == (environment[old] if contract in WITHOUT else None)

    @pytest.mark.parametrize("contract", NAMES)
    @pytest.mark.parametrize("name", [*SERVERS, "c0"])
    def test_names_ranktables_only_where_there_are_any(self, contract: str, name: str) -> None:
        of = service(contract)
        has_ranktables = contract in WITH_RANKTABLES
        script = omniinfer.start_script(of, name)
        if name != "c0":
            assert [v in omniinfer.environment(of, name) for v in self.RANKTABLES] == [
                has_ranktables
            ] * len(self.RANKTABLES)
        container = omniinfer.container(of, name).environment
        assert ("RANKTABLE_SAVE_PATH" in container) is has_ranktables
        assert has_ranktables or "ranktable" not in script.lower()

    @pytest.mark.parametrize("contract", WITHOUT)
    def test_has_the_plug_ins_of_the_engine_unless_the_file_gives_others(
        self, contract: str
    ) -> None:
        assert omniinfer.environment(service(contract), "p0")["OMNI_VLLM_PATCHES"] == "ALL"
        changes = {"settings": {"all": {"environment": {"VLLM_PLUGINS": "mine"}}}}
        assert omniinfer.environment(service(contract, changes), "p0")["VLLM_PLUGINS"] == "mine"


class TestHosts:
    @pytest.mark.parametrize("contract", NAMES)
    def test_get_ranktables_and_are_asked_for_addresses_only_where_they_are_read(
        self, contract: str
    ) -> None:
        of = service(contract)
        has_ranktables = contract in WITH_RANKTABLES
        assert bool(omniinfer.ranktables(of)) is has_ranktables
        assert bool(omniinfer.read_addresses_command(of.deployment, [0, 1])) is has_ranktables

    @pytest.mark.parametrize("contract", NAMES)
    def test_have_the_files_address_on_the_default_route_where_engines_announce_it(
        self, contract: str
    ) -> None:
        of = service(contract).deployment
        right = {name: HostFacts("eth0", {}, host.address) for name, host in of.hosts.items()}
        omniinfer.check_facts(of, right)
        wrong = right | {"b": HostFacts("eth0", {}, "192.168.0.9"), "d": HostFacts("eth0", {})}
        if contract in WITH_RANKTABLES:
            omniinfer.check_facts(of, wrong)
            return
        with pytest.raises(FactsError) as caught:
            omniinfer.check_facts(of, wrong)
        assert "10.0.0.2 of host b (found 192.168.0.9)" in caught.value.message
        assert "10.0.0.4 of host d (found no default route)" in caught.value.message
        assert "host a" not in caught.value.message

    def test_that_run_the_proxy_alone_announce_nothing(self) -> None:
        changes = {"hosts": {"e": "10.0.0.5"}, "proxy": {"c0": {"host": "e"}}}
        of = service("roles", changes).deployment
        facts = {name: HostFacts("eth0", {}, host.address) for name, host in of.hosts.items()}
        omniinfer.check_facts(of, facts | {"e": HostFacts("eth0", {}, "192.168.0.9")})


class TestRules:
    TWO = {"decode": {"d1": {"host": "d", "devices": "0-7"}}}  # noqa: RUF012

    @pytest.mark.parametrize("contract", NAMES)
    def test_several_decode_pods_are_refused_where_ranktables_know_one(self, contract: str) -> None:
        changes = merge(self.TWO, {"hosts": {"e": "10.0.0.5"}, "decode": {"d1": {"host": "e"}}})
        if contract in WITHOUT:
            of = service(contract, changes)
            assert omniinfer.environment(of, "p0")["OMNI_PD_DECODE_POD_NUM"] == "2"
            return
        with pytest.raises(InvalidInput, match="rule one-decode-pod"):
            service(contract, changes)

    @pytest.mark.parametrize("contract", NAMES)
    def test_a_prompt_may_exceed_a_step_where_it_is_split(self, contract: str) -> None:
        split = {"max-num-batched-tokens": 256, "no-enable-chunked-prefill": False}
        changes = {"settings": {"all": {"arguments": split}}}
        if contract in WITHOUT:
            of = service(contract, changes)
            assert omniinfer.longest_prompt(of.deployment, of.topology) == 61244
            unsplit = merge(
                changes, {"settings": {"all": {"arguments": {"no-enable-chunked-prefill": True}}}}
            )
            with pytest.raises(InvalidInput, match="rule batched-tokens"):
                service(contract, unsplit)
            return
        with pytest.raises(InvalidInput, match="rule batched-tokens"):
            service(contract, changes)

    @pytest.mark.parametrize(
        ("contract", "program", "again"),
        [
            ("v0-early", "global", {"p0", "p1", "p2", "d0", "c0"}),
            ("v0", "omni", {"p0", "p1", "p2", "d0", "c0"}),
            ("v1", "omni", {"p1"}),
            ("v1", "global", {"p1", "c0"}),
            ("roles", "omni", {"p1"}),
        ],
    )
    def test_what_starts_again_with_a_server_follows_from_when_links_are_made(
        self, contract: str, program: str, again: set[str]
    ) -> None:
        made = service(contract, {"proxy": {"c0": {"program": program}}})
        assert omniinfer.restarts_with(made.deployment, made.topology, "p1") == again

    @pytest.mark.parametrize(
        ("contract", "program", "works"),
        [
            ("v0-early", "global", True), ("v0-early", "omni", False),
            ("v0", "global", True), ("v0", "omni", True),
            ("v1", "global", True), ("v1", "omni", True),
            ("roles", "global", False), ("roles", "omni", True),
        ],
    )  # fmt: skip
    def test_the_proxy_has_a_program_of_the_image(
        self, contract: str, program: str, works: bool
    ) -> None:
        changes = {"proxy": {"c0": {"program": program}}}
        if works:
            assert f"{program}_proxy.sh" in omniinfer.start_script(service(contract, changes), "c0")
            return
        with pytest.raises(InvalidInput) as caught:
            service(contract, changes)
        (problem,) = caught.value.problems
        assert problem.key == "proxy.c0.program"
        assert problem.message.endswith(f"found {program} (rule proxy-program)")


class TestOmniProxy:
    PREFIX_AWARE = {  # noqa: RUF012
        "proxy": {"c0": {"prefix_aware": True}},
        "settings": {"prefill": {"arguments": {"no-enable-prefix-caching": False}}},
    }

    @pytest.mark.parametrize(
        ("contract", "directory"),
        [
            ("v0", "omni/accelerators/sched/omni_proxy"),
            ("v1", "components/omni-proxy/omni_proxy"),
            ("v1", "omni/accelerators/sched/omni_proxy"),
            ("roles", "components/omni-proxy/omni_proxy"),
        ],
    )
    def test_is_looked_for_and_reckons_with_the_engines_numbers(
        self, contract: str, directory: str
    ) -> None:
        changes = {"settings": {"decode": {"arguments": {"max-num-seqs": 24}}}}
        chosen = {"proxy": {"c0": {"program": "omni"}}} if contract == "v0" else {}
        of = service(contract, changes | chosen)
        options = arguments(of, "c0")
        assert options == {
            "--listen-port": "7000",
            "--prefill-endpoints": "10.0.0.1:9000,10.0.0.2:9001,10.0.0.3:9002",
            "--decode-endpoints": "10.0.0.4:9100",
            "--log-file": f"{of.layout.log_directory('c0')}/nginx_error.log",
            "--log-level": "notice",
            "--core-num": "4",
            "--start-core-index": "16",
            "--access-log-file": f"{of.layout.log_directory('c0')}/nginx_access.log",
            "--omni-proxy-pd-policy": "sequential",
            "--omni-proxy-max-batch-num-token": "61440",
            "--omni-proxy-prefill-max-num-seqs": "64",
            "--omni-proxy-decode-max-num-seqs": "24",
        }
        assert f" /workspace/omniinfer/{directory}" in omniinfer.start_script(of, "c0")

    def test_takes_what_the_file_gives(self) -> None:
        given_ = {"omni_proxy_max_batch_num_token": 5, "omni-proxy-pd-policy": False, "x": "a b"}
        options = arguments(service("v1", {"proxy": {"c0": {"arguments": given_}}}), "c0")
        assert options["--omni-proxy-max-batch-num-token"] == "5"
        assert options["--x"] == "a b"
        assert "--omni-proxy-pd-policy" not in options

    def test_closes_its_way_to_any_address_unless_the_file_opens_it(self) -> None:
        closed = omniinfer.start_script(service("roles"), "c0")
        is_open = omniinfer.start_script(
            service("roles", {"proxy": {"c0": {"pass_through": True}}}), "c0"
        )
        assert closed.count("return 403") == 2
        assert "return 403" not in is_open

    @pytest.mark.parametrize("contract", ["v0", "v1", "roles"])
    def test_that_knows_prefixes_is_told_them_by_prefills(self, contract: str) -> None:
        changes = merge(self.PREFIX_AWARE, {"proxy": {"c0": {"program": "omni"}}})
        of = service(contract, changes)
        seeds = {omniinfer.environment(of, name)["PYTHONHASHSEED"] for name in (*SERVERS, "c0")}
        assert len(seeds) == 1
        assert arguments(of, "c0")["--omni-proxy-model-path"] == "/data/models/QwQ-32B"
        for name in SERVERS:
            instance, is_prefill = of.topology.instance(name), name != "d0"
            assert instance is not None
            assert ("ENABLE_APC_EVENT" in omniinfer.environment(of, name)) is is_prefill
            extra = str(arguments(of, name)["--extra-args"]).split()
            assert ("--kv-events-config" in extra) is is_prefill
            assert instance.ports.get("events") == (instance.api_port + 100 if is_prefill else None)
            if is_prefill:
                config = json.loads(extra[extra.index("--kv-events-config") + 1])
                assert config["endpoint"] == f"tcp://*:{instance.api_port + 100}"

    def test_that_knows_prefixes_needs_a_port_of_each_prefill(self) -> None:
        """Decode's API port is 100 above the first prefill's: on one host they are the same."""
        changes = merge(
            self.PREFIX_AWARE,
            {"decode": {"d0": {"host": "a", "devices": "0-7"}}},
        )
        with pytest.raises(InvalidInput, match=r"9100 on host a is also .* events port of p0"):
            service("roles", changes)

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            (
                {"settings": {"prefill": {"arguments": {"no-enable-prefix-caching": True}}}},
                "prefill.p0.arguments.no-enable-prefix-caching",
            ),
            ({"decode": {"d0": {"environment": {"PYTHONHASHSEED": 0}}}}, "decode.d0.environment."),
            ({"proxy": {"c0": {"environment": {"PYTHONHASHSEED": 0}}}}, "proxy.c0.environment."),
            ({"contract": "v0"}, "proxy.c0.prefix_aware"),
        ],
    )
    def test_that_knows_prefixes_is_refused_what_would_keep_it_from_them(
        self, changes: dict[str, Any], key: str
    ) -> None:
        of = merge(self.PREFIX_AWARE, changes)
        with pytest.raises(InvalidInput) as caught:
            service(of.pop("contract", "v1"), of)
        assert caught.value.problems[0].key.startswith(key)
        assert all(p.message.endswith("(rule prefix-aware)") for p in caught.value.problems)


@given(st.sampled_from(NAMES), st.integers(1, 3))
def test_every_script_is_given_values_that_a_shell_reads_back(
    contract: ContractName, prefills: int
) -> None:
    """Whatever the numbers of pods: what `exec` runs is the launcher with the arguments said."""
    gone = {f"p{index}": None for index in range(prefills, 3)}
    of = service(contract, {"prefill": gone})
    for name in of.topology.names[:-1]:
        last = re.findall(r"^exec (python -c .*)\Z", omniinfer.start_script(of, name), re.M | re.S)
        words = shlex.split(last[0])
        assert words[3:] == omniinfer.command(of, name)[1:]
