"""An image's age is read from its tag, or not at all."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_deploy.engines.omniinfer import image_age
from pd_deploy.engines.omniinfer.image_age import Change
from pd_deploy.registry import tags

CHANGE = Change(date(2025, 8, 13), (0, 4, 0))


@pytest.mark.parametrize(
    ("tag", "day"),
    [
        ("20250722_26", date(2025, 7, 22)),
        ("master-202508191159-daily", date(2025, 8, 19)),
        ("202506272026", date(2025, 6, 27)),
        ("20250611", date(2025, 6, 11)),
        ("release_v0.6.0-20251111-vllm", date(2025, 11, 11)),
        ("master-202512022014-vllm", date(2025, 12, 2)),
        ("v0.4.0_20250906", date(2025, 9, 6)),
        ("test_0.5.0_20250920_v5", date(2025, 9, 20)),
        ("20250722_26-nonginx", date(2025, 7, 22)),
        ("20250722_20250722", date(2025, 7, 22)),
        *(
            (tag, None)
            for tag in (
                "silent", "1", "latest", "20251301_1", "20250230", "202507222460", "B001",
                "2025072212", "20250722120000", "12345678", "99999999", "19991231", "",
                "release_v0.5.0", "release_v0.4.2_0926_2000", "20250722_20250723",
            )
        ),
    ],
)  # fmt: skip
def test_the_day_in_a_tag(tag: str, day: date | None) -> None:
    assert image_age.built(tag) == day


@pytest.mark.parametrize(
    ("tag", "since"),
    [
        ("20250812_26", False),
        ("20250813_1", True),
        ("master-202508122359-daily", False),
        ("master-202508130000-daily", True),
        ("202508122359", False),
        ("202508130000", True),
        ("20250812", False),
        ("20250813", True),
        ("release_v0.3.0", False),
        ("release_v0.3.9_1231_2359", False),
        ("release_v0.4.0", True),
        ("release_v0.4.2_0926_2000", True),
        ("release_v0.10.0", True),
        ("release_v1.0.0", True),
        ("release_v0.5.0_0918_yes", True),
        ("release_v0.6.0-20251111-vllm", True),
        ("nightly-20250701-arm", False),
        ("silent", None),
        # What contradicts itself tells nothing; two days on the same side do.
        ("release_v0.3.0-20251111", None),
        ("20250701-20251111", None),
        ("20251110-20251111", True),
    ],
)
def test_whether_an_image_has_a_change(tag: str, since: bool | None) -> None:
    assert image_age.since(tag, CHANGE) is since


@given(
    day=st.dates(date(2020, 1, 1), date(2099, 12, 31)),
    form=st.sampled_from(["{}_7", "{}", "{}1530", "master-{}0000-daily", "v1-{}-x", "a_{}2359.b"]),
)
def test_every_day_is_found_in_every_form_of_tag(day: date, form: str) -> None:
    tag = form.format(f"{day:%Y%m%d}")
    assert image_age.built(tag) == day
    assert image_age.since(tag, CHANGE) is (day >= CHANGE.day)


@pytest.mark.parametrize(
    "tag",
    [
        "20250722_26",
        "master-202508191159-daily",
        "202506272026",
        "20250611",
        "release_v0.4.2",
        "release_1.2.1.post1-202607241407-vllm",
        "master-202601290115-daily_vllm",
    ],
)
def test_every_family_built_in_tells_its_age(tag: str) -> None:
    assert tags.recognised(tag)
    assert image_age.since(tag, CHANGE) is not None


def test_every_family_is_among_those() -> None:
    # A version alone, of whichever engine, tells no age.
    assert set(tags._FAMILIES) - {"version"} == {
        "daily", "branch-daily", "timestamp", "date", "release", "release-timed", "branch-engine",
    }  # fmt: skip
