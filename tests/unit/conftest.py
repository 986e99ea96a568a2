"""What all unit tests share."""

import copy
import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from pd_deploy.config import yaml_files

# A machine that is busy with something else is no fault of a test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def imported_for_good() -> None:
    """Keep the collector off what has been imported: most of all objects, and they stay. It comes
    seldom, as nearly all that tests make is gone without it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def parsed_once() -> Iterator[None]:
    """Parse each content of a deployment file once, as that is slow."""
    parse = yaml_files._parse

    @cache
    def document(path: Path, _content: bytes, *named_by: Any) -> dict[str, Any]:
        return parse(path, *named_by)

    def parsed(path: Path, *named_by: Any) -> dict[str, Any]:
        try:
            content = path.read_bytes() if path.is_file() else None
        except OSError:
            content = None
        if content is None:
            return parse(path, *named_by)
        return copy.deepcopy(document(path, content, *named_by))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml_files, "_parse", parsed)
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect what killed and cancelled runs in memory leave behind when their module ends.

    Coroutines that are collected while Python 3.11 makes a syntax tree make it raise SystemError
    ("AST constructor recursion depth mismatch"), as it did in tests that read the source.
    """
    yield
    if hasattr(request.module, "World"):
        gc.collect()
