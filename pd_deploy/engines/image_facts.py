"""What an image says of itself, as a throwaway container of it has read it. Pure."""

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

QUESTIONS = 1
"""Counts up when images are asked for more: what was kept of an earlier one is asked again."""

KvParallelMeaning = Literal["prefill pods + 1", "decode's tensor parallel size"]


class ImageFacts(BaseModel):
    """What an image is. What could not be told is empty, or None.

    Attributes:
        questions: the `QUESTIONS` that it has answered.
        script_directory: where the launcher is.
        programs: launchers and proxies by name, with their paths.
        flags: what each of them, or a server, takes, with the leading dashes.
        packages: versions of what is installed, by name.
        connectors: the KV connectors that its sources register.
        ranktables: whether its sources read ranktables.
        kv_parallel_size: what its sources take the number of that name for.
        nginx: its version; `nginx_modules` are those compiled in or lying beside it.
        commit: of its sources.
        silence: what came in place of an answer; then all else is empty, and says nothing.
    """

    model_config = ConfigDict(frozen=True)

    questions: int = 0
    script_directory: str = ""
    programs: dict[str, str] = {}
    flags: dict[str, tuple[str, ...]] = {}
    packages: dict[str, str] = {}
    connectors: tuple[str, ...] = ()
    ranktables: bool | None = None
    kv_parallel_size: KvParallelMeaning | None = None
    nginx: str = ""
    nginx_modules: tuple[str, ...] = ()
    commit: str = ""
    silence: str = ""


FactsOfImage = Mapping[str, ImageFacts]
"""Of one image, by architecture."""


def parse(output: str, mark: str) -> ImageFacts:
    """Parse what a probe printed, on a line that begins with `mark`.

    Raises:
        ValueError: it is no answer; says what it is instead.
    """
    answers = [line for line in output.splitlines() if line.startswith(mark)]
    try:
        answer = json.loads(answers[-1].removeprefix(mark))
        return ImageFacts.model_validate({**answer, "questions": QUESTIONS})
    except (IndexError, TypeError, ValueError):
        shown = " / ".join(output.strip().splitlines()[-3:])[-300:]
        raise ValueError(repr(shown) if shown else "no output") from None


def rows(facts: ImageFacts) -> list[tuple[str, str]]:
    """List the facts for people, each with its name; those that could not be told say so."""
    ranktables = {True: "read", False: "not read", None: ""}[facts.ranktables]
    nginx = ", ".join(filter(None, (facts.nginx, *facts.nginx_modules)))
    return [
        (name, value or "not known")
        for name, value in (
            ("script directory", facts.script_directory),
            *((f"program {name}", path) for name, path in facts.programs.items()),
            *((f"flags of {name}", " ".join(known)) for name, known in facts.flags.items()),
            ("packages", ", ".join(" ".join(package) for package in facts.packages.items())),
            ("KV connectors", ", ".join(facts.connectors)),
            ("ranktables", ranktables),
            ("kv_parallel_size", facts.kv_parallel_size or ""),
            ("nginx", nginx),
            ("commit", facts.commit),
        )
    ]


def brief(facts: ImageFacts) -> str:
    """Name in a line what tells images apart."""
    scripts = (
        f"scripts in {facts.script_directory}" if facts.script_directory else "no launcher",
        ", ".join(facts.programs) or "no launcher or proxy script",
    )
    servers = [f"{len(known)} options of {name}" for name, known in facts.flags.items()]
    found = (
        *(scripts if facts.programs or not facts.flags else servers),
        f"KV connectors {', '.join(facts.connectors)}" if facts.connectors else "",
        ", ".join(" ".join(package) for package in facts.packages.items()),
        f"commit {facts.commit[:12]}" if facts.commit else "",
    )
    return "; ".join(dict.fromkeys(filter(None, found)))
