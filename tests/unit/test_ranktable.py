"""Ranktables hold exactly the documented documents, and only what the hosts really said."""

import json
import os
import subprocess
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_deploy.engines.base import HostFacts
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.engines.omniinfer import ranktable
from pd_deploy.engines.vllm import Vllm
from pd_deploy.errors import FactsError, InvalidInput
from pd_deploy.hosts.host import Host, Hosts
from pd_deploy.hosts.login import Login
from pd_deploy.records.releases import Choice, Record
from pd_deploy.steps import surveying
from pd_deploy.steps.host_records import HostRecords
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session
from pd_deploy.steps.surveying import Addresses, ResolvedImage
from tests.unit import example, topologies

GOLDEN = example.GOLDEN["ranktables"]


def golden(ending: str) -> dict[str, Any]:
    (path,) = [path for path in GOLDEN if path.endswith(ending)]
    found: dict[str, Any] = GOLDEN[path]
    return found


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("p0", "10.0.0.1_01234567.json"),
        ("p1", "10.0.0.1_89101112131415.json"),
        ("p2", "10.0.0.2_01234567.json"),
        ("d0", "10.0.0.2_89101112131415.json"),
    ],
)
def test_local_documents_are_as_documented(name: str, ending: str) -> None:
    of = example.service()
    pod = example.place().pod_of(name)
    assert ranktable.local(pod, example.addresses(of)) == golden(ending)


def test_merged_document_is_as_documented() -> None:
    found = ranktable.merged(example.place(), example.addresses(example.service()))
    assert found == golden("global_ranktable_merge.json")
    assert json.loads(ranktable.render(found)) == found


MANY = settings(max_examples=60, deadline=None)


@MANY
@given(changes=topologies.services())
def test_every_topology_has_dense_unique_ids_and_locals_that_equal_their_group(
    changes: dict[str, Any],
) -> None:
    of, placed = example.service(changes), example.place(changes)
    addresses = example.addresses(of)
    groups = ranktable.merged(placed, addresses)["server_group_list"]
    assert [group["group_id"] for group in groups] == [str(i) for i in range(len(groups))]
    assert [pod.kv_rank for pod in placed.pods] == list(range(len(groups)))
    for pod, group in zip(placed.pods, groups, strict=True):
        local = ranktable.local(pod, addresses)
        assert local["server_list"] == group["server_list"]
        assert type(group["server_count"]) is int
        assert group["server_count"] == len(pod.members)
        assert local["server_count"] == ("1" if len(pod.members) == 1 else len(pod.members))
        assert [s["server_id"] for s in group["server_list"]] == list(pod.addresses)
        ranks = [d["rank_id"] for s in group["server_list"] for d in s["device"]]
        assert ranks == [str(rank) for rank in range(len(ranks))]


@MANY
@given(changes=topologies.services())
def test_nothing_is_lost_or_doubled_whatever_shares_a_host(changes: dict[str, Any]) -> None:
    of, placed = example.service(changes), example.place(changes)
    groups = ranktable.merged(placed, example.addresses(of))["server_group_list"]
    held = [
        (server["server_ip"], device["device_id"])
        for group in groups
        for server in group["server_list"]
        for device in server["device"]
    ]
    address = {name: host.address for name, host in of.hosts.items()}
    wanted = [
        (address[host], str(device))
        for entry in (*of.prefill.values(), *of.decode.values())
        for host in entry.on
        for device in entry.devices_on(host)
    ]
    assert sorted(held) == sorted(wanted)
    assert len(set(held)) == len(held)


@MANY
@given(changes=topologies.services())
def test_ranks_addresses_and_servers_follow_one_order(changes: dict[str, Any]) -> None:
    """What the launchers, the environment, the proxy and the ranktables say agrees."""
    service = example.for_engine(changes)
    placed, (decode,) = service.topology, service.topology.decode
    groups = ranktable.merged(placed, example.addresses(service.deployment))["server_group_list"]
    order = ",".join(server["server_id"] for server in groups[-1]["server_list"])
    for instance in placed.instances:
        environment = omniinfer.environment(service, instance.name)
        assert environment["LOCAL_DECODE_SERVER_IP_LIST"] == order
        assert environment["GLOBAL_DECODE_SERVER_IP_LIST"] == order
        assert environment["PREFILL_POD_NUM"] == str(len(groups) - 1)
        path = environment["RANK_TABLE_FILE_PATH"]
        local = json.loads(omniinfer.ranktables(service)[instance.host][path])
        assert local["server_list"] == groups[instance.kv_rank]["server_list"]
    numbers = []
    for member in decode.members:
        argv = omniinfer.command(service, member.name)
        offset, count, world = (
            int(argv[argv.index(flag) + 1])
            for flag in ("--server-offset", "--num-servers", "--num-dp")
        )
        assert world * decode.tensor_parallel == sum(len(m.devices) for m in decode.members)
        assert count * decode.tensor_parallel == len(member.devices)
        numbers += range(offset, offset + count)
    assert numbers == list(range(len(decode.servers)))
    proxy = omniinfer.command(service, "c0")
    listed = proxy[proxy.index("--decode-servers-list") + 1].split(",")
    assert listed == list(decode.servers)
    assert len(set(listed)) == len(numbers)


def said(**of_device: str) -> str:
    return "".join(f"device {device[1:]}\n{text}" for device, text in of_device.items())


IP = "ipaddr:192.168.1.{}\nnetmask:255.255.255.0\n"


def test_addresses_are_read_whatever_else_is_printed() -> None:
    output = "motd\n" + said(d0=IP.format(100), d10="warning: slow\n" + IP.format(110))
    assert ranktable.parse_addresses(output, [0, 10], host="a (10.0.0.1)") == {
        0: "192.168.1.100",
        10: "192.168.1.110",
    }


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("", ["device 0: no output", "device 1: no output"]),
        (said(d0=IP.format(1)), ["device 1: no output"]),
        (said(d0=IP.format(1), d1=""), ["device 1: no output"]),
        (said(d0=IP.format(1), d1="hccn_tool: not found\n"), ["device 1: hccn_tool: not found"]),
        (said(d0=IP.format(1), d1="ipaddr:fe80::1\n"), ["device 1: ipaddr:fe80::1"]),
        (said(d0=IP.format(1), d1="ipaddr:192.168.1.300\n"), ["device 1: ipaddr:192.168.1.300"]),
        (said(d0=IP.format(1), d1="ipaddr:\n"), ["device 1: ipaddr:"]),
        (said(d0=IP.format(1), d1="address 192.168.1.2\n"), ["device 1: address 192.168.1.2"]),
        (said(d0=IP.format(1), d1=IP.format(1)), ["address 192.168.1.1 is given twice"]),
        (said(d0=IP.format(1), d2=IP.format(2)), ["device 1: no output"]),
    ],
)
def test_devices_without_an_address_of_their_own_are_all_named(
    output: str, says: list[str]
) -> None:
    with pytest.raises(FactsError) as caught:
        ranktable.parse_addresses(output, [0, 1], host="a (10.0.0.1)")
    assert str(caught.value).startswith("host a (10.0.0.1): expected one IPv4 address per device")
    assert caught.value.hint
    assert [text for text in says if text not in str(caught.value)] == []


@given(st.dictionaries(st.integers(0, 63), st.ip_addresses(v=4), max_size=16))
@settings(max_examples=25, deadline=None)
def test_what_is_printed_is_what_is_read(known: dict[int, IPv4Address]) -> None:
    output = "".join(f"device {device}\nipaddr:{address}\n" for device, address in known.items())
    wanted = {device: str(address) for device, address in known.items()}
    if len(set(known.values())) == len(known):
        assert ranktable.parse_addresses(output, list(known), host="a") == wanted


FACTORY = {0: "192.168.11.100", 1: "192.168.11.101"}


def test_hosts_with_the_same_factory_addresses_are_refused_with_every_pair() -> None:
    addresses = {"a": FACTORY, "b": dict(FACTORY), "c": {0: "192.168.12.100"}}
    with pytest.raises(FactsError) as caught:
        ranktable.check_addresses(addresses)
    assert caught.value.message == (
        "expected an address of its own for each device, found: "
        "192.168.11.100 is the address of device 0 on a and of device 0 on b; "
        "192.168.11.101 is the address of device 1 on a and of device 1 on b"
    )
    assert "hccn_tool" in (caught.value.hint or "")
    facts = {name: HostFacts("eth0", of_device) for name, of_device in addresses.items()}
    Vllm().check_facts(example.service(), facts)  # has no use for them


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.dictionaries(st.integers(0, 3), st.sampled_from("wxyz"))
    )
)
def test_addresses_pass_if_and_only_if_none_is_given_twice(
    addresses: dict[str, dict[int, str]],
) -> None:
    given_ = [address for of_device in addresses.values() for address in of_device.values()]
    shared = {address for address in given_ if given_.count(address) > 1}
    try:
        ranktable.check_addresses(addresses)
    except FactsError as error:
        named = error.message.partition("found: ")[2].split("; ")
        assert {text.partition(" ")[0] for text in named} == shared
        assert sum(text.count("device") for text in named) == len(
            [address for address in given_ if address in shared]
        )
    else:
        assert shared == set()


def planned(
    addresses: dict[str, dict[int, str]],
    image: str | None = None,
    changes: dict[str, Any] | None = None,
) -> Rollout:
    """The plan of the example from what its hosts would say, for the image that a run takes."""
    of = example.service(changes)
    hosts = Hosts.of({n: Host(n, h.address, Login()) for n, h in of.hosts.items()})
    states = [
        HostState(
            host=name,
            interface=example.INTERFACE,
            architecture="aarch64",
            docker_version="24",
            docker_root="/var/lib/docker",
            containers=(),
            listening=frozenset(),
            tree={},
            records=HostRecords(Record(), (), frozenset(), frozenset(), True),
        )
        for name in of.hosts
    ]
    taken = ResolvedImage(Choice(image or of.image, None, "the run names it"), example.IMAGE)
    found = [Addresses(name, known) for name, known in addresses.items()]
    return surveying.planned(Session(of, hosts), states, found, taken, "a test")


def test_a_plan_is_made_only_of_devices_with_addresses_of_their_own() -> None:
    addresses = example.addresses(example.service())
    assert planned(addresses).plan.roles
    with pytest.raises(FactsError) as caught:
        planned(dict.fromkeys(addresses, addresses["a"]))
    assert caught.value.message.count(" is the address of device ") == 16


def test_what_breaks_a_rule_with_the_image_of_the_run_is_found_in_the_plan() -> None:
    """The file is right with its own image, and with another whose age is not known."""
    addresses = example.addresses(example.service())
    size = {"kv_parallel_size": "prefill-pods-plus-one"}
    for image in (None, "omni:silent"):
        assert planned(addresses, image, size).plan.roles
    with pytest.raises(InvalidInput, match=r"kv_parallel_size: .* for the image 20251111_1"):
        planned(addresses, "omni:20251111_1", size)


def test_command_asks_every_device_once() -> None:
    command = ranktable.read_addresses_command([8, 9])
    assert command[:2] == ["sh", "-c"]
    assert command[-2:] == ["8", "9"]


def test_all_devices_are_asked_at_the_same_time(tmp_path: Path) -> None:
    """Each answers once the other was asked."""
    tool = tmp_path / "hccn_tool"
    tool.write_text(
        f"""#!/bin/sh
touch {tmp_path}/asked-$2
for _ in $(seq 500); do
    [ ! -e {tmp_path}/asked-8 ] || [ ! -e {tmp_path}/asked-9 ] || exec echo ipaddr:10.0.0.$2
    sleep 0.01
done
"""
    )
    tool.chmod(0o755)
    command = ranktable.read_addresses_command([8, 9])
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    addresses = ranktable.parse_addresses(done.stdout, [8, 9], host="a (10.0.0.1)")
    assert addresses == {8: "10.0.0.8", 9: "10.0.0.9"}
