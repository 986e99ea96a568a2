"""Problems of a deployment file say where the value stands: which file and which line."""

from cProfile import Profile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pd_deploy.config import lines
from pd_deploy.config.load import PROFILES, load_deployment, naming_lines
from pd_deploy.errors import InvalidInput
from pd_deploy.planning import placement
from tests.unit import example

PLACES = {
    "top.yaml": """\
extends: below.yaml
profile: ./mine.yaml
name: {name}
hosts:
  b: 10.0.0.1   # LINE rule
container:
  devices:
    - /dev/a
    - 7   # LINE item
settings:
  prefill:
    environment:
      PREFILL_POD_NUM: 3   # LINE settings
update: &update
  family: nope   # LINE anchored
""",
    "below.yaml": """\
extends: {example}
nam: a   # LINE unknown
prefill:
  p1:
    devices: 0-7   # LINE below
    environment: {{ROLE: x, "a.b": [1]}}   # LINE dotted
""",
    "mine.yaml": """\
profile: qwq-32b-a3
decode:
  gpu_memory_utilization: 7   # LINE profile
  environment:
    ROLE: x   # LINE role
""",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in PLACES.items():
        (tmp_path / name).write_text(text.format(example=example.FILE, name="a"))
    return tmp_path


def place_of(mark: str) -> str:
    """The place of a marked line, as a problem in top.yaml names it."""
    ((name, number),) = [
        (name, number)
        for name, text in PLACES.items()
        for number, line in enumerate(text.splitlines(), 1)
        if line.endswith(f"# LINE {mark}")
    ]
    return f"line {number}" if name == "top.yaml" else f"{name}, line {number}"


def problems(path: Path) -> dict[str, str]:
    """The problems of a file: key → place."""
    with pytest.raises(InvalidInput) as caught, naming_lines(path):
        placement.build(load_deployment(path))
    assert caught.value.source == str(path)
    return {problem.key: problem.place for problem in caught.value.problems}


def test_a_wrong_value_is_named_with_the_file_that_it_comes_from(directory: Path) -> None:
    found = problems(directory / "top.yaml")
    assert (
        found.items()
        >= {
            "container.devices.1": place_of("item"),
            "nam": place_of("unknown"),
            "prefill.p1.environment.a.b": place_of("dotted"),
            "decode.gpu_memory_utilization": place_of("profile"),
            "update.family": place_of("anchored"),
        }.items()
    )


def test_a_broken_rule_is_named_with_the_level_that_the_value_comes_from(directory: Path) -> None:
    for name, wrong in (
        ("top.yaml", ["    - 7   # LINE item\n", "update: &update\n", "  family: nope   # LI"]),
        ("below.yaml", ["nam: a", ', "a.b": [1]']),
        ("mine.yaml", ["  gpu_memory_utilization: 7"]),
    ):
        text = (directory / name).read_text()
        for part in wrong:  # the lines after it stay where they are
            text = text.replace(part, "\n" if part.endswith("\n") else "" if "[" in part else "#")
        (directory / name).write_text(text)
    assert problems(directory / "top.yaml") == {
        "hosts.b": place_of("rule"),
        "prefill.p1.devices": place_of("below"),
        "prefill.p1.environment.ROLE": place_of("dotted"),
        "prefill.p0.environment.PREFILL_POD_NUM": place_of("settings"),
        "prefill.p1.environment.PREFILL_POD_NUM": place_of("settings"),
        "prefill.p2.environment.PREFILL_POD_NUM": place_of("settings"),
        "decode.d0.environment.ROLE": place_of("role"),
    }


@pytest.mark.parametrize(
    ("text", "key", "place"),
    [
        ("prefill:\n  p9:\n    tensor_parallel: 1\n", "prefill.p9.devices", "line 3"),
        ("\nhosts: null\n", "hosts", "line 3"),
        ("x: &x {a: 1}\nhosts: {a: {<<: *x}}\n", "hosts.a.a", "line 2"),
        ("profile: nope\n", "profile", "line 2"),
        ("hosts: {c: 10.0.0.9}\ndecode:\n  d0: {host: z}\n", "decode.d0.host", "line 4"),
    ],
)
def test_what_is_absent_or_merged_is_named_with_what_it_is_part_of(
    tmp_path: Path, text: str, key: str, place: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"extends: {example.FILE}\n{text}")
    assert problems(path)[key] == place


def test_an_error_of_another_file_names_that_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("all: {}\nprofile: nope\n")
    path = tmp_path / "x.yaml"
    path.write_text(f"extends: {example.FILE}\nprofile: ./mine.yaml\n")
    with pytest.raises(InvalidInput, match=r"mine\.yaml: 1 problem\n  line 2: profile: expected"):
        load_deployment(path)


def test_a_value_that_an_option_gives_has_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"extends: {example.FILE}\npull: 1\n")
    with pytest.raises(InvalidInput) as caught:
        load_deployment(path, image="no image")
    assert {p.key: p.place for p in caught.value.problems} == {"image": "", "pull": "line 2"}


def test_every_key_of_the_example_is_where_it_is_looked_up(tmp_path: Path) -> None:
    """Written with one key or item a line, so that the line tells which it is."""
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(example.document(), sort_keys=False))
    written = path.read_text().splitlines()
    places = lines._Places(lines._layers(path), [])
    for key, ends in leaves(example.document()):
        place = places.find(key)
        assert place
        assert place[0] == path
        assert ends in written[place[1] - 1], key
    assert lines._layers(PROFILES / "qwq-32b-a3.yaml")


@pytest.mark.parametrize(
    ("before", "key"),
    [
        ("", "wrong"),
        ("hosts:\n", "  h"),
        ("settings:\n  decode:\n    environment:\n", "      W."),
    ],
    ids=["top", "deeper", "with dots of their own"],
)
def test_lines_of_many_wrong_keys_cost_as_much_each_as_those_of_few(
    tmp_path: Path, before: str, key: str
) -> None:
    """Counted, not timed: calls of Python's functions while the places are looked up."""
    path = tmp_path / "wrong.yaml"

    def calls(count: int) -> int:
        path.write_text(before + "".join(f"{key}{n}: x\n" for n in range(count)))
        above = before.replace(":\n", ".").replace(" ", "")
        layers = lines._layers(path)
        profile = Profile()
        profile.enable()
        places = lines._Places(layers, [])
        found = {places.find(f"{above}{key.strip()}{n}") for n in range(count)}
        profile.disable()
        assert len(found) == count
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(400) < 2.1 * calls(200)


def leaves(part: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(part, dict):
        below = [(f"{key}.{name}".lstrip("."), value) for name, value in part.items()]
        return [leaf for path, value in below for leaf in [(path, path.split(".")[-1])]] + [
            leaf for path, value in below for leaf in leaves(value, path)
        ]
    if isinstance(part, list):
        return [(f"{key}.{index}", str(value)) for index, value in enumerate(part)]
    return []
