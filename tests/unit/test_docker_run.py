"""The pages that turn `docker run` commands into a file: its plan gives the commands back."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pd_deploy import engines
from pd_deploy.config.load import parse_deployment
from pd_deploy.hosts import docker_create
from pd_deploy.planning import placement, plans
from tests.unit import example

NAMES = ("p0", "d0", "c0")
BARE = {"-d"}
"""Options of `docker run` without a value."""
IN_BYTES = {"64g": str(64 << 30)}


def examples(page: str) -> tuple[list[list[str]], str]:
    """The commands of a page's example, and the file that they are."""
    section = page.partition("## From `docker run`")[2].partition("\n## ")[0]
    shell, file = re.findall(r"```(?:sh|yaml)\n(.*?)```", section, re.DOTALL)
    text = re.sub(r"^#.*\n", "", shell.replace("\\\n", ""), flags=re.MULTILINE)
    return [shlex.split(line) for line in text.splitlines()], file


@pytest.mark.parametrize("page", ["sglang", "vllm"])
def test_the_plan_gives_back_the_commands_of_the_page(page: str) -> None:
    commands, file = examples((Path(example.ROOT) / f"docs/{page}.md").read_text())
    of = parse_deployment(yaml.safe_load(file))
    made = plans.make(
        of, placement.build(of), engines.get(of.engine), facts=example.facts(of),
        pinned_image=of.image, history=example.past(),
    ).plan  # fmt: skip
    for name, words in zip(NAMES, commands, strict=True):
        at = words.index(of.image)
        assert words[:3] == ["docker", "run", "-d"]
        instance = made.instance(name)
        created = docker_create.command(instance.container)
        options = [word for word in words[2:at] if word not in BARE]
        for option, value in zip(options[::2], options[1::2], strict=True):
            if option == "-e":
                key, _, text = value.partition("=")
                assert instance.command.environment[key] == text
            elif option == "-v":
                source, _, target = value.partition(":")
                mounts = {m.source: m.target for m in instance.container.mounts}
                assert mounts[of.model.path].startswith(target)
                assert of.model.path.startswith(source)
            else:
                value = IN_BYTES.get(value, value)  # noqa: PLW2901
                limit = f"{value}:-1" if option == "--ulimit" else value
                assert (option, limit) in set(pairwise(created)), (name, option)
        assert given(words[at + 1 :]) <= given(instance.command.argv), name


def given(argv: list[str]) -> set[tuple[str, ...]]:
    """The options of a command, each with its values, and the words before them."""
    groups: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return {tuple(group) for group in groups}
