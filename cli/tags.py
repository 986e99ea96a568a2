"""Listing the tags of a deployment's repositories, and what a run for the newest would take."""

import asyncio
import json
from collections.abc import Iterable

from pd_deploy.cli import hosts
from pd_deploy.cli.tables import aligned
from pd_deploy.config.models import Deployment
from pd_deploy.records.releases import Quarantined
from pd_deploy.registry import tags
from pd_deploy.registry.client import Search
from pd_deploy.steps import surveying

SHOWN_BUILDS = 10  # of each repository; a program that wants them all asks for JSON


def read(deployment: Deployment) -> tuple[Search, dict[str, Quarantined]]:
    """Search the registry as a run for the newest would; read the quarantine from the hosts."""
    with hosts.asking([deployment]):
        return asyncio.run(search(deployment))


async def search(deployment: Deployment) -> tuple[Search, dict[str, Quarantined]]:
    """Search the registry as a run for the newest would; see `read`."""
    async with hosts.connected(deployment) as reached:
        reached.require_all()
        quarantine = dict(reached.history.record.quarantine)
        return await surveying.search_tags(reached.session, reached.history), quarantine


def as_text(searched: Search, quarantine: dict[str, Quarantined]) -> str:
    """Write what was found for people."""
    newest, rule = searched.newest, tags.rule_of(searched.policy)
    taken = f"{newest.image} ({newest.digest[:19]})" if newest else "none"
    lines = [
        *(line for repository in searched.tags for line in _repository(searched, repository)),
        f"would be taken: {taken}, as {rule}",
    ]
    for digest, entry in quarantine.items():
        lines.append(f"in quarantine: {entry.image} ({digest[:19]}): {entry.reason}")
    if newer := searched.newer_of_other_forms:
        lines.append(f"seem newer, but `update` does not take them: {', '.join(newer)}")
    return "\n".join(lines)


def _repository(searched: Search, repository: str) -> list[str]:
    all_tags, policy = searched.tags[repository], tags.described(searched.policy)
    builds = [tag for tag in searched.builds if tag in all_tags]
    unknown, others = _others(searched, all_tags)
    rows = [(tag, _fate(searched, repository, tag)) for tag in builds[:SHOWN_BUILDS]]
    more = len(builds) - len(rows)
    return [
        f"{repository}: {len(all_tags)} tags, {len(builds)} of family {policy}",
        *(f"  {row}" for row in (aligned(rows) if rows else ())),
        *([f"  and {more} older"] if more else []),
        *([f"  of other families: {', '.join(others)}"] if others else []),
        *([f"  of no family: {', '.join(unknown)}"] if unknown else []),
        "",
    ]


def _fate(searched: Search, repository: str, tag: str) -> str:
    """Say what a run for the newest does with a build."""
    newest = searched.newest
    if newest and (newest.repository, newest.tag) == (repository, tag):
        return "would be taken"
    if any((one.repository, one.tag) == (repository, tag) for one in searched.quarantined):
        return "in quarantine"
    if newest and searched.builds.index(tag) >= searched.builds.index(newest.tag):
        return "not needed"
    return "listed, but not there"


def as_json(searched: Search, quarantine: dict[str, Quarantined]) -> str:
    """Write what was found for programs."""
    newest = searched.newest
    repositories = []
    for repository, all_tags in searched.tags.items():
        unknown, others = _others(searched, all_tags)
        repositories.append(
            {
                "repository": repository,
                "builds": [tag for tag in searched.builds if tag in all_tags],
                "of_other_families": others,
                "of_no_family": unknown,
            }
        )
    document = {
        "family": tags.described(searched.policy),
        "taken": newest and {"image": newest.image, "digest": newest.digest},
        "rule": tags.rule_of(searched.policy),
        "repositories": repositories,
        "quarantine": {
            digest: {"image": entry.image, "reason": entry.reason}
            for digest, entry in quarantine.items()
        },
        "newer_of_other_forms": searched.newer_of_other_forms,
    }
    return json.dumps(document, indent=2)


def _others(searched: Search, all_tags: Iterable[str]) -> tuple[list[str], list[str]]:
    """List the tags of no family, and those of families other than the policy's."""
    rest = sorted(set(all_tags) - set(searched.builds))
    unknown = [tag for tag in rest if tags.recognised(tag) is None]
    return unknown, [tag for tag in rest if tag not in unknown]
