"""A lab of the tests' own, beside whatever other lab runs on this machine."""

import ipaddress
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from demo.processes import Processes
from pd_deploy.lab import Lab
from pd_deploy.lab.lifecycle import take_down
from tests.prefect_settings import HOME, PROCESS

pytest.register_assert_rewrite("tests.host_contract", "tests.memory.world")

# With `pytest -n`, each of its processes has a lab; PD_TEST_… are for those who run it twice at a
# time.
NAME = os.environ.get("PD_TEST_LAB", "pdtest") + (f"-{PROCESS}" if PROCESS else "")
_first = ipaddress.ip_network(os.environ.get("PD_TEST_SUBNET", "10.78.0.0/24"))
SUBNET = f"{_first.network_address + 256 * PROCESS}/24"


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A running lab, taken down after the last test whatever happened."""
    if os.geteuid() != 0:
        pytest.fail("the lab's tests make namespaces and mounts: run them as root", pytrace=False)
    with lab_up(NAME, SUBNET) as lab:
        yield lab


@contextmanager
def lab_up(name: str, subnet: str) -> Iterator[Lab]:
    """Start a lab, and take it down whatever happens."""
    noted = HOME / "labs" / name
    noted.parent.mkdir(exist_ok=True)
    noted.touch()
    try:
        yield Lab.up(name, subnet)
    finally:
        take_down(name)
        noted.unlink()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what takes minutes run first: no process of `pytest -n` is left alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind; after Ctrl-C, the processes of `pytest -n` have too little time to."""
    if hasattr(config, "workerinput"):
        return
    for record in HOME.rglob("processes.json"):
        Processes(record.parent).stop_all()
    for noted in HOME.rglob("labs/*"):
        take_down(noted.name)
    shutil.rmtree(HOME, ignore_errors=True)
