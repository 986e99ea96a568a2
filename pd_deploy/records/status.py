"""What serves, by the records and the containers of a deployment's hosts. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pd_deploy.hosts.container_values import DEPLOYMENT_LABEL, ListedContainer
from pd_deploy.records.generations import GENERATION, INSTANCE, RUNNING, latest
from pd_deploy.records.releases import History, Release

SERVES = "serves"


@dataclass(frozen=True)
class Status:
    """A deployment as its hosts have it.

    Attributes:
        generation: the one that serves, or is to; empty if there is none.
        image: its image, with the tag.
        since: when it was promoted last.
        state: `SERVES`, or what is not as it should be.
        remark: what else people want to know.
    """

    deployment: str
    generation: str = ""
    image: str = ""
    since: datetime | None = None
    state: str = SERVES
    remark: str = ""

    @property
    def serves(self) -> bool:
        """Whether all of it runs and clients can connect."""
        return self.state == SERVES


def status(
    deployment: str,
    history: History,
    containers: Mapping[str, Sequence[ListedContainer]],
    away: Mapping[str, str],
) -> Status:
    """Say what serves.

    Args:
        history: what the hosts that answered know of the deployment's past.
        containers: all containers of each host that answered, by its address.
        away: the hosts that did not answer, by address: name, address and why.
    """
    ours = {
        address: [c for c in listed if c.labels.get(DEPLOYMENT_LABEL) == deployment]
        for address, listed in containers.items()
    }
    release, record = history.serving, history.record
    troubles = [f"no answer from {why}" for why in away.values()]
    if release is None:
        running = sorted(c.name for host in ours.values() for c in host if c.status in RUNNING)
        if running:
            troubles.append(f"no generation serves, but {', '.join(running)} runs")
        elif history.generations:
            troubles.append("no generation serves")
        elif not away:
            troubles.append("nothing is deployed")
        return Status(deployment, state="; ".join(troubles), remark=_last_attempt(history))
    troubles += _troubles(release, ours, away)
    if record.closed:
        troubles.append(f"closed to clients since {record.closed:%Y-%m-%d %H:%M:%S}")
    outcome = record.outcomes.get(release.generation)
    return Status(
        deployment,
        release.generation,
        release.chosen_image,
        outcome.when if outcome else None,
        "; ".join(troubles) or SERVES,
        _last_attempt(history),
    )


def _troubles(
    release: Release,
    ours: Mapping[str, Sequence[ListedContainer]],
    away: Mapping[str, str],
) -> list[str]:
    """List what of a release does not run, host by host."""
    troubles = []
    names = {release.generation, release.servers}
    for host in release.hosts.values():
        where = f"{host.name} ({host.address})"
        if host.address in away:
            continue
        if host.address not in ours:
            troubles.append(f"{where} has left the file, and was not asked")
            continue
        members = [c for c in ours[host.address] if c.labels.get(GENERATION) in names]
        ended = [c for c in members if c.status not in RUNNING]
        # Where only the proxy changed, that of the servers' own generation is kept, and ended.
        replaced = {c.labels.get(INSTANCE) for c in members if c not in ended}
        down = [c for c in ended if c.labels.get(INSTANCE) not in replaced]
        if not members:
            troubles.append(f"nothing of it is on {where}")
        troubles += [f"{c.labels.get(INSTANCE, c.name)} on {where}: {c.status}" for c in down]
    return troubles


def _last_attempt(history: History) -> str:
    """Tell how the youngest generation ended, if it is not the one that serves."""
    youngest = latest(history.generations)
    if not youngest or str(youngest) == history.record.serving:
        return ""
    outcome = history.record.outcomes.get(str(youngest))
    if outcome and outcome.result == "good":
        return ""
    return f"last attempt {youngest}: {outcome.result if outcome else 'unfinished'}"
