"""What several of these tests start from."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_deploy.lab.standin.processes import StandinSet, standin_set
from tests.lab.proxies import NGINX, fill_root


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[StandinSet]:
    """A 1P1D set that is not started: p0 has devices 0-7, d0 has 8-15 of the same host."""
    with standin_set(tmp_path, prefills=1) as instances:
        yield instances


@pytest.fixture(scope="session")
def nginx() -> None:
    """Download and unpack nginx, unless that was done before."""
    NGINX.unpack()


@pytest.fixture
def root() -> Iterator[Path]:
    """A root directory with the image's proxy files and links to nginx."""
    with tempfile.TemporaryDirectory() as directory:
        # nginx's workers give up root: below pytest's own directory they could read nothing.
        Path(directory).chmod(0o755)
        fill_root(Path(directory))
        yield Path(directory)
