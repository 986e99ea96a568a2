"""The demo's service over many hosts: a valid file, whatever their number."""

from pathlib import Path

import pytest
import yaml

from demo import fleet
from pd_deploy.config.load import load_deployment
from pd_deploy.lab.lifecycle import host_names
from pd_deploy.planning import placement


@pytest.mark.parametrize(
    ("hosts", "prefills", "decode"),
    [(1, 1, 1), (2, 1, 1), (3, 2, 1), (8, 6, 2), (24, 18, 6), (48, 32, 16), (243, 32, 211)],
)
def test_three_of_four_hosts_have_a_prefill_and_the_decode_spans_the_others(
    tmp_path: Path, hosts: int, prefills: int, decode: int
) -> None:
    names = host_names(hosts)
    addresses = {name: f"10.77.0.{index}" for index, name in enumerate(names, start=11)}
    path = tmp_path / "lab-fleet.yaml"
    path.write_text(yaml.safe_dump(fleet.document(addresses)))
    topology = placement.build(load_deployment(path))
    assert len(topology.prefill) == prefills
    assert [len(pod.members) for pod in topology.decode] == [decode]
    assert {instance.host for instance in topology.instances} == set(names)
    assert fleet.described(hosts).startswith(f"{prefills} prefill")
    assert fleet.described(hosts).endswith(f"over {decode} {'host' if decode == 1 else 'hosts'}")
