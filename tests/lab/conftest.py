"""What several of these tests start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_deploy.lab.standin.processes import StandinSet, standin_set


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[StandinSet]:
    """A 1P1D set that is not started: p0 has devices 0-7, d0 has 8-15 of the same host."""
    with standin_set(tmp_path, prefills=1) as instances:
        yield instances
