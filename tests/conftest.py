"""A lab of the tests' own, beside whatever other lab runs on this machine."""

import os
import shutil
from collections.abc import Iterator

import pytest

from pd_deploy.lab import Lab
from pd_deploy.lab.lifecycle import take_down
from tests import prefect_settings

pytest.register_assert_rewrite("tests.host_contract", "tests.memory.world")

# Others for those who run the tests twice at a time.
NAME = os.environ.get("PD_TEST_LAB", "pdtest")
SUBNET = os.environ.get("PD_TEST_SUBNET", "10.78.0.0/24")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A running lab, taken down after the last test whatever happened."""
    if os.geteuid() != 0:
        pytest.fail("the lab's tests make namespaces and mounts: run them as root", pytrace=False)
    try:
        yield Lab.up(NAME, SUBNET)
    finally:
        take_down(NAME)


def pytest_unconfigure() -> None:
    """Leaves nothing of the tests' Prefect server behind."""
    shutil.rmtree(prefect_settings.HOME, ignore_errors=True)
