"""How much of what tests go through one by one each run of the tests takes."""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

ALL = bool(os.environ.get("PD_TEST_ALL"))
"""Whether tests go through everything (`make test-all`)."""


def sampled(items: Sequence[T], every: int, first: int = 0) -> Sequence[T]:
    """Take each `every`-th of the items, beginning with number `first`; with PD_TEST_ALL, all."""
    return items if ALL else items[first::every]
