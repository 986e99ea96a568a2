"""Ranktables hold exactly the documented documents, and only what the hosts really said."""

import json
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_deploy import ranktable
from pd_deploy.errors import FactsError
from tests.unit import example

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
    instance = next(i for i in example.place().instances if i.name == name)
    assert ranktable.local(instance, example.addresses(of)) == golden(ending)


def test_merged_document_is_as_documented() -> None:
    found = ranktable.merged(example.place(), example.addresses(example.service()))
    assert found == golden("global_ranktable_merge.json")
    assert json.loads(ranktable.render(found)) == found


@st.composite
def services(draw: st.DrawFn) -> dict[str, Any]:
    """Changes that make a service of 1 to 6 prefill pods on hosts of their own."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    count = draw(st.integers(1, 6))
    octets = draw(st.lists(st.integers(1, 250), min_size=4, max_size=4, unique=True))
    slots = draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 16 // size - 1)),
            min_size=count + 1,
            max_size=count + 1,
            unique=True,
        )
    )
    places = [
        {"host": f"h{host}", "devices": list(range(slot * size, (slot + 1) * size))}
        for host, slot in slots
    ]
    return {
        "hosts": {"a": None, "b": None}
        | {f"h{index}": f"10.0.0.{octet}" for index, octet in enumerate(octets)},
        "prefill": {"p0": None, "p1": None, "p2": None}
        | {f"x{index}": place for index, place in enumerate(places[1:])},
        "decode": {"d0": places[0]},
        "proxy": {"c0": {"host": "h0"}},
    }


@settings(max_examples=25, deadline=None)
@given(changes=services())
def test_every_topology_has_dense_unique_ids_and_locals_that_equal_their_group(
    changes: dict[str, Any],
) -> None:
    of, placed = example.service(changes), example.place(changes)
    addresses = example.addresses(of)
    groups = ranktable.merged(placed, addresses)["server_group_list"]
    assert [group["group_id"] for group in groups] == [str(i) for i in range(len(groups))]
    assert [i.kv_rank for i in placed.instances] == list(range(len(groups)))
    for instance, group in zip(placed.instances, groups, strict=True):
        assert ranktable.local(instance, addresses)["server_list"] == group["server_list"]
        (server,) = group["server_list"]
        assert server["server_id"] == instance.address
        assert [d["rank_id"] for d in server["device"]] == [
            str(rank) for rank in range(len(instance.devices))
        ]
    held = [
        (group["server_list"][0]["server_id"], device["device_id"])
        for group in groups
        for device in group["server_list"][0]["device"]
    ]
    assert len(set(held)) == len(held)


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


def test_command_asks_every_device_once() -> None:
    command = ranktable.read_addresses_command([8, 9])
    assert command[:2] == ["sh", "-c"]
    assert command[-2:] == ["8", "9"]
