"""What a run would do, as far as the hosts answer."""

import asyncio
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from pd_deploy.cli import show
from pd_deploy.cli.hosts import asking, connected
from pd_deploy.config.models import Deployment
from pd_deploy.engines.base import HostFacts
from pd_deploy.errors import FactsUnknown, HostUnreachable, NoSuchGeneration, PdDeployError
from pd_deploy.flows import survey
from pd_deploy.hosts.container_values import ContainerState
from pd_deploy.planning.plans import STAGES, HostPlan, Plan
from pd_deploy.records import generations
from pd_deploy.records.adopted import UNCOMPARED
from pd_deploy.records.releases import History, Record
from pd_deploy.steps import host_records, surveying
from pd_deploy.steps.host_records import HostRecords, Saved
from pd_deploy.steps.rollout import HostState, Rollout
from pd_deploy.steps.session import Session


@dataclass(frozen=True)
class Planned:
    """What a run would do now, as far as the hosts answer.

    Attributes:
        states: what the hosts said that answer.
        before: what serves, as it was saved; None where nothing serves, or that can't be read.
        unreadable: why it can't be read.
        rollout: None where too little is known of hosts that don't answer.
        unplanned: why there is none.
        assumed: which hosts that don't answer it assumes to be as they were.
        away: by address, why hosts don't answer; former ones, too.
    """

    states: Sequence[HostState]
    history: History
    before: Saved | None
    unreadable: str
    rollout: Rollout | None
    unplanned: str
    assumed: Sequence[str]
    away: Mapping[str, PdDeployError]

    @property
    def plan(self) -> Plan | None:
        """The plan, with what a run would do, of the hosts that answer."""
        if self.rollout is None:
            return None
        made, present = self.rollout.with_actions(STAGES), self.rollout.session.present
        return made.model_copy(update={"hosts": {name: made.hosts[name] for name in present}})

    @property
    def said(self) -> str:
        """What the image is, and what is different, in a line each."""
        told = (self.rollout.said_by_image, self.rollout.said_of_changes) if self.rollout else ()
        return "\n".join(filter(None, told))

    @property
    def known_of_image(self) -> dict[str, object]:
        """What is known of the image, for programs: by which contract it is deployed, and what it
        says of itself, by architecture, as far as a run has asked it."""
        if self.rollout is None:
            return {}
        release = self.rollout.release
        said = self.history.record.facts_of(release.digest).items()
        facts = {architecture: of.model_dump(mode="json") for architecture, of in said}
        return {"contract": release.contract or None, "image_facts": facts}

    @property
    def reservation(self) -> str:
        """What is not known, or only assumed, because hosts don't answer; empty if all do."""
        if self.unplanned or not self.away:
            return self.unplanned
        if not self.assumed:
            return "not complete: a run needs all hosts"
        return (
            f"not complete: a run needs all hosts; {', '.join(self.assumed)} is assumed to be as "
            f"when {self.history.record.serving} was deployed"
        )

    @property
    def rows(self) -> list[str]:
        """Each host that does not answer, with the cause; then what to do, the same once."""
        hints = dict.fromkeys(error.hint for error in self.away.values() if error.hint)
        return [
            *(error.unanswered for error in self.away.values()),
            *(f"→ {hint}" for hint in hints),
        ]

    def require_plan(self, *, of_all: bool) -> Plan:
        """Return the plan, for formats that can't do without.

        Raises:
            HostUnreachable: there is none, or not of all hosts.
        """
        if (plan := self.plan) and not (of_all and self.away):
            return plan
        raise HostUnreachable("\n  ".join([self.reservation, *self.rows]))


def of(deployment: Deployment, image: str | None) -> Planned:
    """Plan what a run would do now, as far as the hosts answer; change nothing on them.

    Raises:
        HostUnreachable: no host answers.
    """
    with asking([deployment]):
        return asyncio.run(look(deployment, image))


async def look(deployment: Deployment, image: str | None) -> Planned:
    """Plan what a run would do; see `of`."""
    async with connected(deployment) as connection:
        session = connection.session
        answers, reached = await connection.ask(lambda name: surveying.survey(session, name))
        states = [*answers.values()]
        if not reached.session.present:
            reached.require_all()
        history = surveying.history_of(states)
        before, unreadable = await _saved(reached.session, history)
        assumed = _assumed(deployment, before, reached.away) if before else {}
        rollout, unplanned = None, ""
        try:
            facts = {name: facts for name, (facts, _) in assumed.items()}
            planned = await survey.plan_of(
                reached.session, states, image, "a look", facts_of_absent=facts
            )
            others = {name: state for name, (_, state) in assumed.items()}
            rollout = replace(planned, states={**planned.states, **others})
        except FactsUnknown as error:
            unplanned = error.message
        names = [*assumed]
        return Planned(states, history, before, unreadable, rollout, unplanned, names, reached.away)


def text(name: str, look: Planned, *, full: bool = False) -> str:
    """Print the plan of a deployment, as far as its hosts answer, and those that don't.

    Args:
        name: the deployment's.
        full: print all that is made, too.
    """
    lines = [look.reservation] if look.away else []
    if made := look.plan:
        shown = show.plan(made, "\n".join([*filter(None, [look.said]), *lines]), full=full)
        return "\n".join([shown, *([""] if look.away else []), *look.rows])
    lines = [f"{name}: {look.reservation}"]
    for state in look.states:
        running = [c.name for c in state.containers if c.status in generations.RUNNING]
        runs = f"runs {', '.join(running)}" if running else "nothing of the deployment runs there"
        lines += ["", f"== host {state.host}", runs]
    return "\n".join([*lines, "", *look.rows])


async def _saved(session: Session, history: History) -> tuple[Saved | None, str]:
    """Read what serves, as it was saved; None and why, if that can't be done."""
    if history.serving is None:
        return None, UNCOMPARED if history.record.adopted_serving else ""
    try:
        return await host_records.load(session.hosts, session.root, history.serving.generation), ""
    except NoSuchGeneration as error:
        return None, error.message


def _assumed(
    deployment: Deployment, before: Saved, away: Container[str]
) -> dict[str, tuple[HostFacts, HostState]]:
    """Return hosts that don't answer as they were when what serves was deployed, with its
    containers running, by their names in the file; those of which that is not known are left out.

    Args:
        away: their addresses.
    """
    names = {entry.address: name for name, entry in before.deployment.hosts.items()}
    assumed = {}
    for name, entry in deployment.hosts.items():
        facts = before.facts.get(names.get(entry.address, ""))
        if facts and entry.address in away:
            planned = before.plan.hosts[names[entry.address]]
            assumed[name] = (facts, _as_planned(name, facts, planned))
    return assumed


def _as_planned(name: str, facts: HostFacts, planned: HostPlan) -> HostState:
    specs = [instance.container for instance in planned.instances.values()]
    return HostState(
        host=name,
        interface=facts.interface,
        architecture="",
        docker_version="",
        docker_root="",
        containers=tuple(
            ContainerState(c.name, c.name, c.labels, "running", None, None, None, c.image)
            for c in specs
        ),
        listening=frozenset(),
        tree={},
        records=HostRecords(Record(), (), frozenset(), frozenset(), reserve=True),
    )
