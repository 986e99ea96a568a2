"""Watching something in a thread of its own, while a `with` block runs."""

import threading
from abc import ABC, abstractmethod
from typing import Self


class Watch(ABC):
    """A watch that begins with the block and is over at its end, at the latest."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @abstractmethod
    def _watch(self) -> None:
        """Watch, until there is nothing more to see or `_over` is set."""
