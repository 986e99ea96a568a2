"""Tables for people to read."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

NARROWEST = 30
"""The last column is not folded to less than this: a line that the terminal folds reads better."""


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align rows in columns; the first row is the heading.

    Each row is one line. On a terminal that is too narrow for that, the last column is folded;
    elsewhere it is not, so that a line is a row for `grep` and `cut`.
    """
    *widths, last = [max(map(len, column)) for column in zip(*rows, strict=True)]
    before = sum(widths) + 2 * len(widths)
    room = last
    if sys.stdout.isatty():
        room = min(last, max(shutil.get_terminal_size().columns - before, NARROWEST))
    lines = []
    for *cells, text in rows:
        columns = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        first, *more = (
            [text]
            if len(text) <= room
            else textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        )
        lines.append("  ".join([*columns, first]).rstrip())
        lines += [" " * before + line for line in more]
    return lines
