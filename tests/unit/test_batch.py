"""Many commands in one: run by a real shell, read back."""

import subprocess

import pytest

from pd_deploy.hosts import batch
from pd_deploy.hosts.batch import Lane, Printed


def ran(first: Lane, *lanes: Lane, limit: float = 20, last: Lane = ()) -> dict[str, Printed]:
    command = batch.command(first, lanes, limit, last)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return batch.parse(done.stdout)


def test_each_command_is_found_by_its_words_whatever_it_prints() -> None:
    words = ["printf", "%s", "a; 'quoted' $HOME"]
    printed = ran([["echo", "first"], ["no-such-tool", "-x"]], [words], [["sh", "-c", "exit 3"]])
    assert batch.of(printed, ["echo", "first"]) == Printed("first\n")
    assert batch.of(printed, ["sh", "-c", "exit 3"]) == Printed("", 3)
    assert batch.of(printed, words) == Printed("a; 'quoted' $HOME")
    missing = batch.of(printed, ["no-such-tool", "-x"])
    assert missing.exit_status == 127
    assert "not found" in missing.shown


def test_one_that_hangs_costs_only_those_behind_it() -> None:
    hangs, behind = ["sleep", "60"], ["echo", "late"]
    printed = ran([["echo", "first"]], [["echo", "before"], hangs, behind], limit=0.3)
    assert batch.of(printed, ["echo", "first"]).text == "first\n"
    assert batch.of(printed, ["echo", "before"]).text == "before\n"
    assert batch.of(printed, hangs) == batch.of(printed, behind) == Printed("", None)
    assert batch.of(printed, behind).shown == "nothing in time"


def test_the_last_one_waits_for_all_others() -> None:
    of_lane, of_last = ["date", "+%s.%N"], ["date", "+%s.%N", "-u"]
    printed = ran([["true"]], [["sleep", "0.3"], of_lane], [], last=[of_last])
    assert [*printed] == ["sleep 0.3", "date +%s.%N", "true", "date +%s.%N -u"]
    assert float(batch.of(printed, of_last).text) > float(batch.of(printed, of_lane).text)


def test_what_is_too_long_is_cut_and_hides_no_other() -> None:
    long = ["sh", "-c", "yes 0123456789 | head -c 20000"]
    printed = ran([long], *([[*long, str(n)]] for n in range(8)))
    assert len(batch.of(printed, long).text) == 20000  # of the first lane, all
    for n in range(8):
        cut = batch.of(printed, [*long, str(n)])
        assert cut.exit_status is None
        assert set(cut.text.splitlines()[1:-1]) == {"0123456789"}


def test_a_command_of_several_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="one line"):
        batch.command([["echo", "a\nb"]])
