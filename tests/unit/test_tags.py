"""The newest build of a family comes first, whatever else is in the repository."""

import random
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_deploy.config.models import UpdatePolicy
from pd_deploy.errors import InvalidInput
from pd_deploy.registry import tags
from tests.unit import example

# All forms that were seen upstream.
MIXED = [
    "20250722_26",
    "20250722_9",
    "20250723_1",
    "master-202508191159-daily",
    "master-202508191200-daily",
    "release-0.5-202509010000-daily",
    "202506272026",
    "20250611",
    "20250615",
    "release_v0.4.2",
    "release_v0.4.2_0926_2000",
    "release_v0.4.2_0925_0000",
    "release_v0.5.0_0918_yes",
    "release_v0.5.0",
    "release_v0.10.0_0101_0000",
    "release_v0.6.0-20251111-vllm",
    "release_v0.7.1-202512052350-vllm",
    "release_v0.7.1-202602061150-vllm",
    "release_1.2.1.post1-202606292354-vllm",
    "release_1.2.1.post1-202607241407-vllm",
    "release_1.2.1-202608010000-vllm",
    "release_1.10.0-202607010000-vllm",
    "release_v0.7.0_rc1-202511151600-sglang-no_nnal",
    "release_v0.7.0-202511151600-sglang",
    "master-202512022014-vllm",
    "master-202601290115-daily_vllm",
    "master-202511200900-sglang",
    "v0.23.0-a3",
    "v0.23.0rc1-a3",
    "v0.9.2-a3",
    "v0.25.1rc1-a3",
    "nightly-main",
    "v0.5.13.post1-cann9.0.0-a3",
    "v0.5.13-cann9.0.0-a3",
    "main-cann9.0.0-a3",
    "0.0.1",
    "master_20251025_0.6.0_v2",
    "v0.4.0_20250906",
    "test_0.5.0_20250920_v5",
    "B001",
    "latest",
]
IMAGE = "registry.example/omni-ci/daily_omniinfer"


def order(found: list[str] = MIXED, **policy: Any) -> list[str]:
    return tags.newest_first(UpdatePolicy.model_validate(policy), found)


def refused(update: object, **changes: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        example.service({"update": update, **changes})
    return [str(problem) for problem in caught.value.problems]


class TestFamilies:
    def test_daily_builds_are_ordered_by_date_then_by_number(self) -> None:
        assert order(family="daily") == ["20250723_1", "20250722_26", "20250722_9"]

    def test_branch_daily_builds_are_those_of_the_branch_alone(self) -> None:
        assert order(family="branch-daily", branch="master") == [
            "master-202508191200-daily",
            "master-202508191159-daily",
        ]
        assert order(family="branch-daily", branch="release-0.5") == [
            "release-0.5-202509010000-daily"
        ]
        assert order(family="branch-daily", branch="m.ster") == []

    def test_timestamps_and_dates_are_families_of_their_own(self) -> None:
        assert order(family="timestamp") == ["202506272026"]
        assert order(family="date") == ["20250615", "20250611"]

    def test_releases_are_ordered_by_version_and_the_bare_tag_ends_one(self) -> None:
        assert order(family="release") == [
            "release_v0.10.0_0101_0000",
            "release_v0.5.0",
            "release_v0.4.2",
            "release_v0.4.2_0926_2000",
            "release_v0.4.2_0925_0000",
        ]

    def test_timed_releases_are_those_of_the_engine_by_version_then_by_time(self) -> None:
        assert order(family="release-timed", engine="vllm") == [
            "release_1.10.0-202607010000-vllm",
            "release_1.2.1.post1-202607241407-vllm",
            "release_1.2.1.post1-202606292354-vllm",
            "release_1.2.1-202608010000-vllm",
            "release_v0.7.1-202602061150-vllm",
            "release_v0.7.1-202512052350-vllm",
            "release_v0.6.0-20251111-vllm",
        ]
        assert order(family="release-timed", engine="sglang") == [
            "release_v0.7.0-202511151600-sglang"
        ]

    def test_builds_of_a_branch_and_engine_are_ordered_by_time_in_both_spellings(self) -> None:
        assert order(family="branch-engine", branch="master", engine="vllm") == [
            "master-202601290115-daily_vllm",
            "master-202512022014-vllm",
        ]
        assert order(family="branch-engine", branch="main", engine="vllm") == []

    def test_versions_are_those_with_the_suffix_and_a_final_is_above_its_candidates(self) -> None:
        assert order(family="version", suffix="-a3") == [
            "v0.25.1rc1-a3", "v0.23.0-a3", "v0.23.0rc1-a3", "v0.9.2-a3",
        ]  # fmt: skip
        assert order(family="version", suffix="-cann9.0.0-a3") == [
            "v0.5.13.post1-cann9.0.0-a3",
            "v0.5.13-cann9.0.0-a3",
        ]
        assert order(family="version") == []
        assert order(["v1.0", "v1.0.0.1", "v1.0a2", "v1.0b1", "v1.0.post2"], family="version") == [
            "v1.0.0.1", "v1.0.post2", "v1.0", "v1.0b1", "v1.0a2",
        ]  # fmt: skip

    @pytest.mark.parametrize("suffix", ["_test", "_yes", "_RC1", "-rc", "_0926", "_0926_2000_yes"])
    def test_releases_with_another_suffix_never_count(self, suffix: str) -> None:
        assert order([f"release_v0.4.2{suffix}"], family="release") == []

    @pytest.mark.parametrize(
        ("family", "tag"),
        [
            ("daily", "20251301_1"),
            ("date", "99999999"),
            ("date", "20250229"),
            ("timestamp", "202506272460"),
            ("release", "release_v0.4.2_0230_0000"),
            ("date", "２０２５０６１１"),
            ("daily", "20250722_" + "9" * 200),
        ],
    )
    def test_digits_that_are_no_date_never_count(self, family: str, tag: str) -> None:
        assert order([tag], family=family) == []

    def test_a_release_of_29_february_counts(self) -> None:
        tag = "release_v0.4.2_0229_1200"
        assert order([tag], family="release") == [tag]

    def test_a_tag_named_twice_comes_once(self) -> None:
        assert order(["20250611", "20250611"], family="date") == ["20250611"]


class TestPattern:
    def test_numbers_are_compared_as_numbers_and_the_rest_as_text(self) -> None:
        found = ["a-9", "a-26", "b-1", "a-x"]
        assert order(found, family="pattern", pattern=r"(\w)-(\w+)") == [
            "b-1",
            "a-x",
            "a-26",
            "a-9",
        ]

    def test_order_says_which_group_weighs_most(self) -> None:
        found = ["v1-20250101", "v2-20240101"]
        pattern = r"v(?P<version>\d+)-(?P<day>\d+)"
        assert order(found, family="pattern", pattern=pattern)[0] == "v2-20240101"
        assert order(found, family="pattern", pattern=pattern, order=["day"])[0] == "v1-20250101"
        assert order(found, family="pattern", pattern=pattern, order=[2, 1])[0] == "v1-20250101"

    def test_a_group_that_took_no_part_is_the_oldest(self) -> None:
        found = ["v1", "v1.0", "v1.1"]
        assert order(found, family="pattern", pattern=r"v(\d+)(?:\.(\d+))?") == found[::-1]

    def test_it_has_to_match_the_whole_tag(self) -> None:
        assert order(["B001", "B001x", "xB001"], family="pattern", pattern=r"B(\d+)") == ["B001"]


DAYS = st.dates(min_value=datetime(2000, 1, 1).date()).map(lambda day: day.strftime("%Y%m%d"))
BUILDS = st.tuples(DAYS, st.integers(0, 10**6))


class TestAnyTags:
    @given(st.lists(BUILDS, unique=True), st.lists(st.text(max_size=12)), st.randoms())
    def test_daily_order_is_that_of_day_and_number(
        self, builds: list[tuple[str, int]], others: list[str], shuffle: random.Random
    ) -> None:
        strangers = [tag for tag in others if tags.recognised(tag) is None]
        found = [f"{day}_{number}" for day, number in builds] + strangers
        shuffle.shuffle(found)
        expected = [f"{day}_{number}" for day, number in sorted(builds, reverse=True)]
        assert order(found, family="daily") == expected

    @given(st.lists(st.text(alphabet="0123456789_.-abv", max_size=20)), st.randoms())
    def test_order_does_not_depend_on_the_registrys(
        self, found: list[str], shuffle: random.Random
    ) -> None:
        policies: list[dict[str, Any]] = [
            {"family": "pattern", "pattern": r"(.*?)(\d*)([a-z]+)?"},
            *({"family": family} for family in ("daily", "timestamp", "date", "release")),
        ]
        for policy in policies:
            first = order(found, **policy)
            shuffle.shuffle(found)
            assert order(found, **policy) == first
            assert set(first) <= set(found)

    @pytest.mark.parametrize(
        ("policy", "newest", "told"),
        [
            # Builds by time: by whatever name they go on.
            (
                {"family": "daily"},
                "20250722_26",
                ["master-202512022014-vllm", "master-202511200900-sglang", "20251224_x"],
            ),
            (
                {"family": "branch-daily", "branch": "master"},
                "master-202508191159-daily",
                ["master-202512022014-vllm", "master-202511200900-sglang", "20251224_x"],
            ),
            (
                {"family": "branch-engine", "branch": "master", "engine": "vllm"},
                "master-202512022014-vllm",
                ["20251224_x"],
            ),
            # Releases, by their versions if they have no date.
            (
                {"family": "release"},
                "release_v0.5.0",
                ["release_v0.6.0-20251111-vllm", "v0.9.0-vllm", "v0.9.1-310p"],
            ),
            (
                {"family": "release-timed", "engine": "vllm"},
                "release_v0.6.0-20251111-vllm",
                ["v0.9.0-vllm", "v0.9.1-310p", "20251224_x"],
            ),
            ({"family": "version", "suffix": "-vllm"}, "v0.9.0-vllm", []),
            ({"family": "pattern", "pattern": r"B(\d+)"}, "B001", []),
            (
                {"family": "pattern", "pattern": r"build-(\d+)"},
                "build-20251201",
                ["20251224_x"],
            ),
        ],
    )
    def test_newer_tags_of_other_forms_are_those_that_may_follow(
        self, policy: dict[str, Any], newest: str, told: list[str]
    ) -> None:
        """Not builds of another branch, engine or suffix, nor releases beside builds by time."""
        pushed = [
            newest,
            "20251224_x",
            "latest",
            "main-cann9.0.0-a3",
            "master-202512022014-vllm",
            "master-202511200900-sglang",
            "release_v0.6.0-20251111-vllm",
            "v0.9.0-vllm",
            "v0.9.1-310p",
        ]
        of = UpdatePolicy.model_validate(policy)
        assert sorted(tags.newer_of_other_forms(of, newest, pushed)) == sorted(told)

    def test_tags_of_other_forms_with_a_later_date_are_told(self) -> None:
        policy = UpdatePolicy.model_validate({"family": "daily"})
        found = [*order(family="daily"), "20250723_x", "v0.4.0_20250906", "release_v0.4.2", "x"]
        assert tags.newer_of_other_forms(policy, "20250723_1", found) == ("v0.4.0_20250906",)
        assert tags.newer_of_other_forms(policy, "20251001_1", found) == ()
        release = UpdatePolicy.model_validate({"family": "release"})
        assert tags.newer_of_other_forms(release, "release_v0.4.2", found) == ()

    @pytest.mark.parametrize(
        ("tag", "family"),
        [
            ("20250722_26", "daily"),
            ("master-202508191159-daily", "branch-daily"),
            ("release_v0.5.0", "release"),
            ("release_v0.4.2_0926_2000", "release"),
            ("release_v0.6.0-20251111-vllm", "release-timed"),
            ("release_v0.7.0-202602061150-vllm", "release-timed"),
            ("release_v0.7.1-202512052350-vllm", "release-timed"),
            ("release_v0.7.1-202602061150-vllm", "release-timed"),
            ("release_1.2.1.post1-202606292354-vllm", "release-timed"),
            ("release_1.2.1.post1-202607241407-vllm", "release-timed"),
            ("master-202512022014-vllm", "branch-engine"),
            ("master-202601290115-daily_vllm", "branch-engine"),
            ("master-202511200900-sglang", "branch-engine"),
            ("v1.0.0-vllm", "version"),
            ("v0.23.0-a3", "version"),
            ("v0.25.1rc1-a3", "version"),
            ("v0.9.1-310p", "version"),
            ("v0.5.13.post1-cann9.0.0-a3", "version"),
        ],
    )
    def test_the_form_of_a_tag_tells_its_family(self, tag: str, family: str) -> None:
        policy = tags.recognised(tag)
        assert policy is not None
        assert policy.family == family
        assert tags.newest_first(policy, [*MIXED, tag])

    @pytest.mark.parametrize(
        "tag",
        [
            "release_v0.7.0_rc1-202511151600-sglang-no_nnal",
            "main-cann9.0.0-a3",
            "v0.4.0_20250906",
            "0.0.1",
            "nightly-main",
            "B001",
            "latest",
            "master_20251025_0.6.0_v2",
        ],
    )
    def test_what_belongs_to_no_family_is_not_recognised(self, tag: str) -> None:
        assert tags.recognised(tag) is None

    @given(st.sampled_from(MIXED) | st.from_regex(r"[0-9]{8}(_[0-9]+)?|[0-9]{12}", fullmatch=True))
    def test_a_tag_is_of_one_family_at_most(self, tag: str) -> None:
        families = ("daily", "timestamp", "date", "release", "version")
        assert sum(tag in order([tag], family=family) for family in families) <= 1


class TestPolicyOfAFile:
    @pytest.mark.parametrize(
        ("tag", "family", "branch"),
        [
            ("20250722_26", "daily", None),
            ("master-202508191159-daily", "branch-daily", "master"),
            ("my-branch-202508191159-daily", "branch-daily", "my-branch"),
            ("202506272026", "timestamp", None),
            ("20250611", "date", None),
            ("release_v0.5.0", "release", None),
            ("release_v0.4.2_0926_2000", "release", None),
            ("release_1.2.1.post1-202607241407-vllm", "release-timed", None),
            ("master-202601290115-daily_vllm", "branch-engine", "master"),
            ("v0.23.0rc1-a3", "version", None),
        ],
    )
    def test_is_recognised_from_the_tag_it_has(
        self, tag: str, family: str, branch: str | None
    ) -> None:
        policy = tags.policy_of(example.service({"image": f"{IMAGE}:{tag}"}))
        assert (policy.family, policy.branch) == (family, branch)
        assert tags.newest_first(policy, [*MIXED, tag]).count(tag) == 1

    @pytest.mark.parametrize("rest", [":latest", ":release_v0.5.0_0918_yes", "@sha256:" + "0" * 64])
    def test_that_cannot_be_recognised_says_what_to_write(self, rest: str) -> None:
        with pytest.raises(
            InvalidInput, match=r"update: expected a family of tags.*\n→ set `update: "
        ):
            tags.policy_of(example.service({"image": IMAGE + rest}))

    def test_is_what_the_file_says_if_it_says_so(self) -> None:
        given_policy = {"family": "pattern", "pattern": r"b(\d+)"}
        found = tags.policy_of(example.service({"update": given_policy}))
        assert tags.described(found) == r"pattern (b(\d+))"

    @pytest.mark.parametrize(
        ("update", "says"),
        [
            ({}, "update.family: is missing"),
            ("daily", "update: expected a mapping, found 'daily'"),
            (
                {"family": "weekly"},
                "update.family: expected 'daily', 'branch-daily', 'timestamp', 'date', 'release', "
                "'release-timed', 'branch-engine', 'version' or 'pattern', found 'weekly'",
            ),
            (
                {"family": "branch-daily"},
                "update.branch: expected a branch such as master, because the family is "
                "branch-daily; found none",
            ),
            (
                {"family": "daily", "branch": "master"},
                "update.branch: expected none, because the family is daily and not branch-daily or "
                "branch-engine, found 'master'",
            ),
            (
                {"family": "release-timed"},
                "update.engine: expected an engine such as vllm, because the family is "
                "release-timed; found none",
            ),
            (
                {"family": "release-timed", "engine": "v LLM"},
                "update.engine: expected an engine as tags spell it, found 'v LLM'",
            ),
            (
                {"family": "date", "suffix": "-a3"},
                "update.suffix: expected none, because the family is date and not version, found "
                "'-a3'",
            ),
            (
                {"family": "version", "suffix": "a3"},
                "update.suffix: expected what follows the version, such as -a3, found 'a3'",
            ),
            (
                {"family": "branch-daily", "branch": "a/b"},
                "update.branch: expected a branch as tags spell it, found 'a/b'",
            ),
            (
                {"family": "pattern"},
                r"update.pattern: expected a regular expression such as build-(\d+), because the "
                "family is pattern; found none",
            ),
            (
                {"family": "pattern", "pattern": "a("},
                "update.pattern: expected a regular expression, found 'a(' "
                "(missing ), unterminated subpattern at position 1)",
            ),
            (
                {"family": "pattern", "pattern": "latest"},
                r"update.pattern: expected groups to compare tags by, as in build-(\d+), found "
                "none in 'latest'",
            ),
            (
                {"family": "pattern", "pattern": "(?P<n>.)", "order": ["m"]},
                "update.order: expected groups of the pattern (n, 1), each once, found m",
            ),
            (
                {"family": "pattern", "pattern": "(.)", "order": [1, 1]},
                "update.order: expected groups of the pattern (1), each once, found 1, 1",
            ),
            (
                {"family": "pattern", "pattern": "(.)", "order": [True]},
                "update.order.0: expected the name or number of a group, found True",
            ),
            (
                {"family": "daily", "order": [1]},
                "update.order: expected no `order` without a `pattern`, found one",
            ),
            (
                {"family": "daily", "repository": "omni/x:latest"},
                "update.repository: expected a repository without a tag, such as "
                "omni-ci/daily_omniinfer, found 'omni/x:latest'",
            ),
            (
                {"family": "daily", "repository": ["a", "omni/x", "a"]},
                "update.repository: expected each repository once, found a more than once",
            ),
            (
                {"family": "daily", "repository": ["omni/x", 1]},
                "update.repository: expected a repository without a tag, such as "
                "omni-ci/daily_omniinfer, found 1",
            ),
            (
                {"family": "daily", "repository": "omni/../x"},
                "update.repository: expected a repository without a tag, such as "
                "omni-ci/daily_omniinfer, found 'omni/../x'",
            ),
        ],
    )
    def test_that_is_wrong_ends_in_one_clear_problem(self, update: object, says: str) -> None:
        assert refused(update) == [says]

    def test_a_registry_is_trusted_in_one_way(self) -> None:
        registry = {"insecure": True, "ca": "/etc/ca.pem"}
        assert refused({"family": "daily"}, registry=registry) == [
            "registry: expected either `insecure` or `ca`, found both"
        ]


class TestRepositoryOfAFile:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, "registry.example/omni-ci/daily_omniinfer"),
            ({"image": IMAGE + "@sha256:" + "0" * 64}, "registry.example/omni-ci/daily_omniinfer"),
            ({"image": "10.0.0.9:5000/a/b:1"}, "10.0.0.9:5000/a/b"),
            ({"image": "a/b:1"}, "a/b"),
            ({"registry": {"host": "10.0.0.9:5000"}}, "10.0.0.9:5000/omni-ci/daily_omniinfer"),
            ({"update": {"family": "daily", "repository": "x/y"}}, "registry.example/x/y"),
            ({"update": {"family": "daily", "repository": "other.example/y"}}, "other.example/y"),
            (
                {
                    "update": {"family": "daily", "repository": "other.example/y"},
                    "registry": {"host": "10.0.0.9:5000"},
                },
                "10.0.0.9:5000/y",
            ),
        ],
    )
    def test_is_the_images_unless_the_policy_names_one(
        self, changes: dict[str, Any], expected: str
    ) -> None:
        of = example.service({"image": f"{IMAGE}:20250722_26", **changes})
        assert of.update_repositories == (expected,)

    def test_may_be_several_of_one_registry_or_another(self) -> None:
        update = {"family": "daily", "repository": ["omni/x", "other.example/y"]}
        of = example.service({"image": f"{IMAGE}:20250722_26", "update": update})
        assert of.update_repositories == ("registry.example/omni/x", "other.example/y")
        assert refused(update, registry={"credentials": "pd-registry"}) == [
            "update: expected repositories of one registry, because `registry.credentials` are for "
            "one; found other.example, swr.cn-east-4.myhuaweicloud.com"
        ]
        mirror = {"credentials": "pd-registry", "host": "10.0.0.9:5000"}
        of = example.service({"update": update, "registry": mirror})
        assert of.update_repositories == ("10.0.0.9:5000/omni/x", "10.0.0.9:5000/y")
