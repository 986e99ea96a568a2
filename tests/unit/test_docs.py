"""The documentation says what is so."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pd_deploy.config import yaml_files
from pd_deploy.config.load import load_deployment, parse_deployment, profiles
from pd_deploy.config.models import DERIVED, CodeTree, Deployment
from pd_deploy.config.rule_names import ALLOWABLE, CHECKS, RULES
from pd_deploy.engines.omniinfer import corrections
from pd_deploy.hosts.container_values import ContainerSpec
from pd_deploy.planning import placement

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/deployment-file.md").read_text()
EXAMPLE = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


OF_ENGINES = re.findall(r"```yaml\n((?:sglang|vllm):\n.*?)```", PAGE, re.DOTALL)
# Options of containers that only the other engine uses, and what there is none of by default, have
# an example here.
EXAMPLES = {"container": {"gpus"}, "gates": {"benchmark"}}


def documented() -> dict[str, Any]:
    assert EXAMPLE
    document: dict[str, Any] = yaml.safe_load(EXAMPLE[1])
    del document["extends"]
    return document


def documented_of_engines() -> dict[str, Any]:
    assert len(OF_ENGINES) == 2
    document: dict[str, Any] = yaml.safe_load("".join(OF_ENGINES))
    return document


def models(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """The models below a model."""
    found = {kind}
    pending: list[Any] = [field.annotation for field in kind.model_fields.values()]
    while pending:
        one = pending.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            found |= models(one)
        pending += getattr(one, "__args__", ())
    return found


def keys(document: object) -> set[str]:
    if isinstance(document, dict):
        return set(document).union(*(keys(value) for value in document.values()))
    if isinstance(document, list):
        return set[str]().union(*(keys(value) for value in document))
    return set()


def test_the_documented_file_is_valid() -> None:
    placement.build(parse_deployment(documented()))
    for engine, name in (("sglang", "sglang-gpu-2p1d"), ("vllm", "vllm-gpu-3p1d")):
        file = yaml_files.read(ROOT / f"deployments/{name}.yaml")
        placement.build(parse_deployment(file | {engine: documented_of_engines()[engine]}))


def test_every_key_is_documented() -> None:
    written = keys(documented()) | keys(documented_of_engines()) | {"source", "target", "read_only"}
    of_file = models(Deployment) - {CodeTree}  # which a run reads
    fields = {field for model in of_file for field in model.model_fields}
    assert fields - written == set(DERIVED)


@pytest.mark.parametrize("section", ["supports", "ports", "paths", "container", "gates", "smoke"])
def test_documented_defaults_are_the_defaults(section: str) -> None:
    default = Deployment.model_fields[section].default
    given = {k: v for k, v in documented()[section].items() if k not in EXAMPLES.get(section, ())}
    assert type(default).model_validate(given) == default


def test_every_profile_is_listed_with_its_examples() -> None:
    table = PAGE.partition("## Profiles")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| .* \| (.*) \|$", table, re.MULTILINE)
    listed = {
        (profile, example)
        for profiles_of_row, examples in rows
        for profile in re.findall(r"`([^`]+)`", profiles_of_row)
        for example in re.findall(r"`([^`]+)`", examples)
    }
    files = (ROOT / "deployments").glob("*.yaml")
    used = {(load_deployment(file).profile, file.stem) for file in files}
    assert {profile for profile, _ in listed} == set(profiles()) - {"omniinfer"}  # it tunes nothing
    assert {pair for pair in used if not pair[1].startswith("lab-")} <= listed


@pytest.mark.parametrize("name", sorted(set(profiles()) - {"qwq-32b-a3", "sglang-cpu", "vllm-cpu"}))
def test_a_profile_that_nobody_has_tried_says_so(name: str) -> None:
    """All but the one of the documented service, and those that CI runs."""
    text = (ROOT / f"pd_deploy/config/profiles/{name}.yaml").read_text()
    opening = text.partition("\nengine:")[0].replace("\n# ", " ")
    assert "Not tried on hardware" in opening


def test_every_rule_is_documented_as_it_is() -> None:
    section = PAGE.partition("## Rules")[2]
    table = re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", section, re.MULTILINE)
    assert dict(table) == RULES


def test_every_check_of_hosts_is_documented() -> None:
    page = (ROOT / "docs/preflight.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) == set(CHECKS)
    (sentence,) = re.findall(r"Errors of (.*?) can be allowed", page)
    assert tuple(re.findall(r"`([a-z-]+)`", sentence)) == ALLOWABLE


def test_the_list_of_corrections_has_the_bounds_of_logs_that_containers_get() -> None:
    spec = ContainerSpec(name="x", image="x")
    (found,) = [c for c in corrections.CORRECTIONS if c.name == "log-rotation"]
    size = spec.log_max_size.replace("m", " MB")
    assert f"the last {spec.log_max_file} files of {size}" in found.ours


def test_the_list_of_corrections_names_each_once() -> None:
    names = [c.name for c in corrections.CORRECTIONS]
    assert sorted(set(names)) == sorted(names)


def test_the_list_of_corrections_is_the_one_in_code() -> None:
    page = (ROOT / "docs/corrections.md").read_text()
    assert page == corrections.as_markdown()


CONTRACT = ROOT / "docs/omni-infer-contract.md"
NUMBER = r"\d+(?:\.\d+)?"
NUMBERS = rf"{NUMBER}(?:(?:, | to | and |, and ){NUMBER})*"
CITATIONS = (
    re.compile(rf"contract,?\s+(?:#\s+)?(?:sections?\s+)?({NUMBERS})", re.IGNORECASE),
    re.compile(rf"\bsections?\s+({NUMBERS})", re.IGNORECASE),
    re.compile(r"\((\d\.\d(?:(?: to | and |, )\d\.\d)*)\)"),
    re.compile(r"configuration of (\d\.\d)"),
)


def cited(file: Path) -> Iterator[str]:
    """The numbers of the contract's sections that a file names."""
    text = file.read_text()
    for pattern in CITATIONS:
        for numbers in pattern.findall(text):
            yield from re.findall(NUMBER, numbers)
    if file.suffix == ".json":
        rules = json.loads(text)
        fields = (one.get("section") for part in rules.values() for one in _entries(part))
        yield from (number for number in fields if number not in (None, "-"))


def _entries(part: object) -> list[dict[str, Any]]:
    values = part.values() if isinstance(part, dict) else ()
    return [value for value in values if isinstance(value, dict)]


def citing() -> dict[str, set[str]]:
    """The files of the project that cite the contract, with the sections they cite."""
    files = [
        file
        for room in ("pd_deploy", "lab/standin", "tasks", "flows", "cli")
        for file in (ROOT / room).rglob("*")
        if file.suffix in (".py", ".sh", ".json", ".yaml", ".lua") and file.is_file()
    ]
    numbers = {str(file.relative_to(ROOT)): set(cited(file)) for file in files}
    return {file: found for file, found in numbers.items() if found}


def test_every_section_of_the_contract_that_is_cited_is_there() -> None:
    headings = set(re.findall(rf"^#+ ({NUMBER}) ", CONTRACT.read_text(), re.MULTILINE))
    found = citing()
    assert {f: sorted(n - headings) for f, n in found.items() if n - headings} == {}
    # What is looked for is found: in docstrings, in messages, and in the stand-in's rules.
    assert {"3.2", "3.4"} <= found["pd_deploy/engines/omniinfer/ranktable.py"]
    assert {"2.2", "4.1", "9.4"} <= found["pd_deploy/engines/omniinfer/environment.py"]
    standin = "lab/standin/image/usr/local/Ascend/latest/standin"
    assert {"1.7", "4.8"} <= found[f"{standin}/rules.json"]
    assert {"4.1", "4.6"} <= found[f"{standin}/main.py"]


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{target}#{anchor}"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


NAMED = re.compile(r"`([\w./-]+\.py)(?:::(\w+))?`(?: \(([^()]*)\))?")
IN_A_PICTURE = re.compile(r"([\w/]+/\w+\.py) (\w+(?:, \w+(?![\w/.]))*)")
OTHER_FILES = re.compile(r"`((?:pd_deploy|lab|deployments|tests|docs)/[\w./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_function_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for file, test, names in NAMED.findall(text):
        found = _files(file)
        assert found, file
        for name in filter(None, [test, *re.findall(r"`(\w+)`", names)]):
            assert any(_defines(one, name) for one in found), f"{file} has no {name}"
    for file, names in IN_A_PICTURE.findall(text):
        for name in names.split(", "):
            assert _defines(ROOT / file, name), f"{file} has no {name}"
    assert [file for file in OTHER_FILES.findall(text) if not (ROOT / file).exists()] == []


def _files(name: str) -> list[Path]:
    """The files of a page's name for them: from the root, or by their last part alone."""
    if "/" in name:
        return [ROOT / name] if (ROOT / name).is_file() else []
    rooms = ("pd_deploy", "lab", "tests", "tasks", "flows", "cli", "bench", "demo", "blocks")
    return [file for room in rooms for file in (ROOT / room).rglob(name)]


def _defines(file: Path, name: str) -> bool:
    text = file.read_text()
    return bool(
        re.search(rf"^\s*(?:async def|def|class) {name}\b|^{name}\b.*=", text, re.MULTILINE)
    )


def test_rules_that_the_contract_names_are_rules() -> None:
    lists = re.findall(r"\brules? ((?:`[a-z-]+`(?:, )?)+)", CONTRACT.read_text())
    names = {name for one in lists for name in re.findall(r"`([a-z-]+)`", one)}
    assert names
    assert names <= RULES.keys()
