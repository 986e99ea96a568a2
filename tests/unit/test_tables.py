"""Tables on a terminal, and in a pipe."""

import os
import sys

import pytest

from pd_deploy.cli import tables

ROWS = [("host", "found"), ("a", " ".join(["expected one thing, found another"] * 4)), ("b", "")]


def test_in_a_pipe_a_row_is_a_line() -> None:
    assert tables.aligned(ROWS) == ["host  found", f"a     {ROWS[1][1]}", "b"]


@pytest.mark.parametrize("columns", [60, 80, 10])
def test_on_a_terminal_the_last_column_is_folded_below_its_heading(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(tables.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    heading, *rows = tables.aligned(ROWS)
    assert heading == "host  found"
    assert max(map(len, rows)) <= max(columns, 6 + tables.NARROWEST)
    assert all(row.startswith(("a     ", "b", "      ")) for row in rows)
    assert " ".join(row[6:] for row in rows).strip() == ROWS[1][1]
