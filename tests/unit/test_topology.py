"""What follows from the 3P1D file, and what is refused before any host is touched."""

from typing import Any

import pytest

from pd_deploy.errors import InvalidInput
from pd_deploy.planning import placement
from tests.unit import example

GOLDEN = example.GOLDEN["derived_per_instance"]


@pytest.mark.parametrize("name", ["p0", "p1", "p2", "d0"])
def test_instances_are_as_documented(name: str) -> None:
    placed = example.place()
    found = next(i for i in placed.instances if i.name == name)
    golden, engine = GOLDEN[name], example.GOLDEN["engine"][name]
    assert found.address == golden["ansible_host"]
    assert found.master_address == golden["host_ip"]
    assert found.ports == {
        "master": golden["node_port"],
        "api": golden["api_port"],
        "zmq": golden["zmq_port"],
    }
    assert found.kv_rank == engine["kv_transfer_config_parsed"]["kv_rank"]
    assert found.device_list == engine["vllm_env"]["ASCEND_RT_VISIBLE_DEVICES"]
    assert found.tensor_parallel == 8


def test_order_is_prefill_as_in_the_file_then_decode_then_proxy() -> None:
    placed = example.place()
    assert placed.names == ("p0", "p1", "p2", "d0", "c0")
    assert [i.kv_rank for i in placed.instances] == [0, 1, 2, 3]
    assert [i.name for i in placed.on_host("a")] == ["p0", "p1"]
    assert [placed.host_of(name) for name in placed.names] == ["a", "a", "b", "b", "a"]
    assert (placed.proxies[0].address, placed.proxies[0].port) == ("10.0.0.1", 7000)


def test_server_lists_are_the_documented_ones() -> None:
    placed, golden = example.place(), example.GOLDEN["derived_global"]
    assert (
        ",".join(s for p in placed.prefill for s in p.servers)
        == golden["proxy_prefill_servers_list"]
    )
    assert (
        ",".join(s for p in placed.decode for s in p.servers) == golden["proxy_decode_servers_list"]
    )


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"prefill": {"p1": {"devices": "7-14"}}},
        ["prefill.p1.devices: expected devices of its own on host a, found 7, which p0 has"],
    ),
    (
        {"prefill": {"p2": {"devices": "8-15"}}},
        ["decode.d0.devices: expected devices of its own on host b, found 8, 9, 10, 11, 12, 13"],
    ),
    (
        {"proxy": {"c0": {"port": 9000}}},
        ["prefill.p0: its api port 9000 on host a is also the port of proxy c0"],
    ),
    (
        {"ports": {"api": 8001}},
        ["prefill.p1: its master port 8001 on host a is also the api port of p0"],
    ),
    (
        {"ports": {"zmq": 65500}},
        ["ports: zmq port of d0 would be 65600, above 65535"],
    ),
    (
        {"ports": {"decode_offset": 2}},
        ["decode.d0: its ", "ports.decode_offset: expected at least the number of prefill"],
    ),
    (
        {"prefill": {"d0": {"host": "a", "devices": "0-7"}, "p0": None}},
        ["d0: expected a name used once among prefill, decode and proxy"],
    ),
    (
        {"prefill": {"p0": None, "ranktables": {"host": "a", "devices": "0-7"}}},
        ["ranktables: expected another name"],
    ),
    (
        {"hosts": {"b": "10.0.0.1"}},
        ["hosts.b: expected an address of its own, found 10.0.0.1, which host a has"],
    ),
    (
        {"prefill": {"p2": None}, "decode": {"d1": {"host": "b", "devices": "0-7"}}},
        ["decode: expected one pod, found d0, d1"],
    ),
    (
        {"prefill": {"p0": {"tensor_parallel": 4}}},
        ["prefill.p0.tensor_parallel: expected the number of its devices (8), found 4"],
    ),
    (
        {"prefill": {"p0": {"devices": "0-3"}}},
        ["prefill.p0.devices: expected the tensor parallel size of decode d0 (8), found 4"],
    ),
    (
        {"decode": {"d0": {"devices": "9-16"}}},
        ["decode.d0.devices: expected ids below 16 (profile qwq-32b-a3), found 16"],
    ),
    *(
        (
            {"prefill": {"p0": {"arguments": {"max-num-batched-tokens": tokens}}}},
            ["prefill.p0.arguments.max-num-batched-tokens: expected at least the model length"],
        )
        for tokens in (40960, True, "61440")
    ),
    (
        {"model": {"max_len_decode": 61441}},
        ["decode.d0.arguments.max-num-batched-tokens: expected at least the model length of 61441"],
    ),
    *(
        (
            {"decode": {"d0": {"arguments": {"x": value}}}},
            ["decode.d0.arguments.x: expected a value without blanks (the launcher splits at"],
        )
        for value in ("a b", "", "a\tb", '{"a": 1}')
    ),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[str(c)[:60] for c, _ in REFUSED])
def test_what_cannot_run_is_refused(changes: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        example.place(changes)
    problems = list(map(str, caught.value.problems))
    for start in expected:
        assert any(problem.startswith(start) for problem in problems), problems


def test_all_refusals_come_at_once_and_name_the_deployment() -> None:
    with pytest.raises(InvalidInput) as caught:
        example.place(
            {
                "hosts": {"b": "10.0.0.1"},
                "prefill": {"p1": {"devices": "0-7"}},
                "model": {"max_len_decode": 61441},
            }
        )
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith("deployment qwq-3p1d: 3 problems\n")


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_prefill_pods_move_decodes_rank(count: int) -> None:
    changes = {f"p{index}": None for index in range(count, 3)}
    placed = placement.build(example.service({"prefill": changes}))
    assert [i.kv_rank for i in placed.decode] == [count]
    assert placed.decode[0].master.api_port == 9100


class TestPortsOfAPod:
    def test_replace_those_of_the_formula(self) -> None:
        own = {"ports": {"master": 8500, "api": 9016, "zmq": 5584}}
        placed = example.place({"prefill": {"p1": own}})
        ports = {i.name: i.ports for i in placed.instances}
        assert ports["p1"] == {"master": 8500, "api": 9016, "zmq": 5584}
        assert ports["p0"] == {"master": 8000, "api": 9000, "zmq": 5568}
        assert placed.prefill[1].servers == ("10.0.0.1:9016",)

    def test_differ_by_host(self) -> None:
        changes = {
            "profile": "deepseek-r1-a3-2p1d",
            "hosts": {"c": "10.0.0.3", "d": "10.0.0.4"},
            "prefill": {"p1": None, "p2": None, "p0": {"devices": "0-15"}},
            "decode": {
                "d0": {
                    "host": None,
                    "hosts": ["c", "d"],
                    "devices": "0-15",
                    "ports": {"api": {"c": 9100, "d": 9116}, "zmq": {"c": 5668, "d": 5684}},
                }
            },
        }
        decodes = example.place(changes).decode[0].members
        assert [d.api_ports[0] for d in decodes] == [9100, 9116]
        assert [d.api_ports[-1] for d in decodes] == [9115, 9131]
        assert [d.zmq_port for d in decodes] == [5668, 5684]
        assert {d.master_port for d in decodes} == {8100}

    @pytest.mark.parametrize(
        ("ports", "says"),
        [
            ({"api": 70000}, "expected a port, or one for each host, found 70000"),
            ({"api": {"b": 9000}}, "expected ports.api for each of its hosts (a), found"),
            ({"api": True}, "expected a port, or one for each host, found True"),
            ({"zmq": "5568"}, "expected a port, or one for each host, found '5568'"),
            ({"api": 9000}, "its api port 9000 on host a is also the api port of p0"),
        ],
    )
    def test_that_cannot_be_are_refused(self, ports: dict[str, Any], says: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            example.place({"prefill": {"p1": {"ports": ports}}})
        assert says in str(caught.value)
