"""The import: files in, deployment file and report out. Reads the files; writes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from pd_deploy.engines.omniinfer.contracts import CONTRACTS, contract_of, expected
from pd_deploy.importer import (
    documents,
    inventory,
    omni_cli,
    playbook,
    roles,
    round_trip,
    shell,
    writing,
)
from pd_deploy.importer.documents import Node
from pd_deploy.importer.report import Place, Report
from pd_deploy.importer.source import Answers, Server, Source
from pd_deploy.importer.writing import Draft


@dataclass(frozen=True)
class Import:
    """What became of the files: the text of a deployment file, unless the report has problems."""

    report: Report
    text: str | None
    draft: Draft | None
    originals: dict[str, Server]


def run(
    inventory_file: Path,
    template: Path | None,
    *,
    name: str,
    answers: Answers,
    profile: str | None = None,
    compat: bool = False,
) -> Import:
    """Import an inventory with its playbook, or, without one, a profile of omni_cli.

    Args:
        name: the deployment's.
        profile: the one to begin the file with, instead of the one that says most of it.
        compat: keep upstream's values, and allow the rules that they break.

    Raises:
        InvalidInput: a file can't be read, or is none of these.
    """
    root = documents.read(inventory_file)
    report = Report()
    source = Source(report, Place(inventory_file.name, root.place.line))
    with _bounded(source.place):
        _read(root, template, source, answers)
    _check(source)
    originals = {server.name: deepcopy(server) for server in source.servers}
    draft = None
    if not report.of("problem"):
        draft = writing.Writer(source, name, profile=profile, compat=compat).draft()
    if draft is None or report.of("problem"):
        return Import(report, None, None, originals)
    round_trip.compare(source, originals, draft)
    if expected(draft.deployment) is None:
        report.add("changed", source.place, "image", _age(draft))
    files = [inventory_file.name, *([template.name] if template else [])]
    return Import(report, writing.text_of(draft, _comments(files, draft)), draft, originals)


@contextmanager
def _bounded(place: Place) -> Iterator[None]:
    try:
        yield
    except (shell.TooLong, RecursionError) as error:
        message = "expected scripts as playbooks have them, found values that grow without end"
        raise documents.refused(place, message) from error


def _read(root: Node, template: Path | None, source: Source, answers: Answers) -> None:
    listed = inventory.entries(root, source.report, answers)
    if template is None:
        if not omni_cli.is_profile(root):
            message = (
                "expected a profile of omni_cli, whose entries have `args`; an inventory needs its "
                "playbook as a second file"
            )
            raise documents.refused(root.place, message)
        omni_cli.group_pods(listed)
        inventory.describe(listed, source)
        omni_cli.read(listed, source, answers)
        return
    document = documents.read(template)
    play = playbook.play_of(document, source.report, answers)
    inventory.describe(listed, source)
    reader = roles if roles.is_of_roles(play) else playbook
    reader.read(listed, play, source, answers)


def _check(source: Source) -> None:
    """Report what a service needs and the files don't say, and what it can't have."""
    report = source.report
    for role in writing.ROLES:
        servers = source.of(role)
        for key in ("model_path", "served_name", "max_len"):
            values = {getattr(server, key) for server in servers}
            what = f"{role}: {key.replace('_', ' ')}"
            if len(values) > 1:
                listed = ", ".join(sorted(map(str, values)))
                report.add("problem", source.place, what, f"expected one for all, found {listed}")
            elif values == {None}:
                report.add("problem", source.place, what, "expected one, found none")
    _check_connector(source)


def _check_connector(source: Source) -> None:
    connectors = {str(s.kv["kv_connector"]) for s in source.servers if s.kv.get("kv_connector")}
    known = {contract.connector for contract in CONTRACTS.values()}
    for connector in sorted(connectors - known):
        message = f"expected one that a contract has ({', '.join(sorted(known))})"
        source.report.add("problem", source.place, f"kv_connector {connector}", message)
    if len(connectors & known) > 1:
        message = f"expected one for all, found {', '.join(sorted(connectors))}"
        source.report.add("problem", source.place, "kv_connector", message)
    if source.contract is None and connectors == {CONTRACTS["v1"].connector}:
        source.contract = "v1"


def _comments(files: list[str], draft: Draft) -> Iterator[str]:
    yield f"Made by pd-deploy import-ansible from {' and '.join(files)}."
    yield _age(draft)


def _age(draft: Draft) -> str:
    """Say which contract the image is taken for, and why."""
    contract = contract_of(draft.deployment).name
    if expected(draft.deployment) is None:
        why = "assumed: the tag does not tell; a run asks the image itself"
    elif draft.deployment.contract != "by-image":
        why = "by its connector, or by the form of the playbook"
    else:
        why = "by its tag"
    return f"The image's contract: {contract}, {why}."
