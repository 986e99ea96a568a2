"""Releases: what was deployed when, what serves, what is good, what is quarantined. Pure.

Every generation leaves a `Release` on each of its hosts, written before anything of it is made.
One `Record` says what became of them; the one with the highest sequence counts. It is written to
the first proxy's host first, by one atomic rename: that is the moment of promotion. The other hosts
get a copy, so that it outlives any of them.
"""

import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from pd_deploy.config.models import DOCKER_SOCKET
from pd_deploy.engines.image_facts import QUESTIONS, FactsOfImage, ImageFacts
from pd_deploy.errors import NotOurs
from pd_deploy.records import benchmark
from pd_deploy.records.adopted import GENERATION as ADOPTED
from pd_deploy.records.adopted import SHOWN, AdoptedService
from pd_deploy.records.benchmark import Figures
from pd_deploy.records.generations import Generation, latest

RELEASE = "release.json"
PLAN = "plan.json"
RECORD = "record.json"
QUARANTINE = (
    100  # images at most; `newest` would have to be bad as often in a row to take one again
)
IMAGES = 20  # whose facts are kept; one that is older is asked again
ATTEMPTS = 50  # they fit, with all else, into the room that is kept for the record on a full disk
Result = Literal["good", "failed", "interrupted"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class HostAccess(_Frozen):
    """How a host of a release is reached; `credentials` names a block."""

    name: str
    address: str
    user: str | None = None
    port: int = 22
    credentials: str | None = None
    ssh_address: str | None = None
    docker_socket: str = DOCKER_SOCKET


class Place(_Frozen):
    """Where an instance, or a proxy, of a release is; `host` is the host's name then."""

    role: str
    pod: str
    host: str


class Release(_Frozen):
    """One generation: when and why it was made, and of what.

    Attributes:
        generation: its name.
        servers: the generation whose servers it runs; another one when only the proxy changed.
        servers_fingerprint: stands for all of its servers.
        chosen_image: the image as somebody wrote it, with a tag.
        pinned_image: the image by digest, or by id with `pull: never` or from a file.
        file_image: what the deployment file said at that time.
        hosts: all its hosts by their names then.
        instances: where each instance and each proxy is; older versions wrote none.
        contract: of its image, by which it was rendered; older versions wrote none.
        code: digests of the source trees that its containers mount.
        against: the generation that served when it was made; older versions wrote none.
        changes: what it changes against that one: its image, and keys of the file by name.
        logs: where its log files are on them.
        created: when it was first attempted, by the controller's clock.
        started_by: the run that made it, and who or what started that.
    """

    generation: str
    servers: str
    servers_fingerprint: str
    # Older versions wrote `image` and `exact`.
    chosen_image: str = Field(validation_alias=AliasChoices("chosen_image", "image"))
    pinned_image: str = Field(validation_alias=AliasChoices("pinned_image", "exact"))
    file_image: str
    hosts: dict[str, HostAccess]
    instances: dict[str, Place] = {}
    contract: str = ""
    code: tuple[str, ...] = ()
    against: str = ""
    changes: tuple[str, ...] = ()
    logs: str
    created: datetime
    started_by: str

    @property
    def digest(self) -> str:
        """`sha256:…` of its image."""
        return digest_of(self.pinned_image)

    @property
    def addresses(self) -> frozenset[str]:
        """Those of its hosts."""
        return frozenset(access.address for access in self.hosts.values())

    @property
    def changed(self) -> str:
        """What it changes against the generation before, in a line."""
        return ", ".join(self.changes)

    def log_root(self, deployment: str) -> str:
        """Return the directory with the logs of all deployments, as the file said then.

        Raises:
            NotOurs: `logs` is another place than pd-deploy puts logs in. What a release says is
                read from hosts, and used on all of them.
        """
        root = self.logs.removesuffix(f"/{deployment}/{self.generation}")
        is_plain = self.logs.startswith("/") and posixpath.normpath(self.logs) == self.logs
        if root == self.logs or not is_plain or not Generation.parse(self.generation):
            raise NotOurs(
                f"expected the logs of generation {self.generation!r} in a directory "
                f"{deployment}/{self.generation}, found {self.logs!r} in its {RELEASE}",
                hint=f"look at who changed {RELEASE} on any of the hosts, and put it right",
            )
        return root


class Outcome(_Frozen):
    """How the last attempt at a generation ended."""

    result: Result
    when: datetime
    by: str
    reason: str = ""


class Quarantined(_Frozen):
    """An image that no nightly run takes again, and why."""

    image: str
    when: datetime
    reason: str


class Attempt(_Frozen):
    """A run that changed what serves, or failed; kept when its generation is pruned.

    Attributes:
        generation: the one that it was about; empty if it failed before it had planned.
        image: its image, as somebody wrote it; empty where that is not known.
    """

    result: Result
    when: datetime
    by: str
    reason: str = ""
    generation: str = ""
    image: str = ""


class Hold(_Frozen):
    """Who keeps all runs from working on the deployment, since when and why."""

    by: str
    when: datetime
    reason: str

    def __str__(self) -> str:
        return f"{self.by}, since {self.when:%Y-%m-%d %H:%M:%S}: {self.reason}"


class Silence(_Frozen):
    """A server, or the proxy, that runs and gives no answer, although its port is open.

    Attributes:
        run: which run of its container.
        checks: at how many checks in a row.
        last: when the last of them was.
    """

    run: str
    checks: int
    last: datetime


class Mending(_Frozen):
    """What health has tried to keep the serving generation up.

    Attributes:
        attempts: when each began, the latest last.
        failed: when the last one failed; None if it did not.
        gave_up: since when it tries no more; None while it would.
        silent: by instance, what gave no answer at the last check.
    """

    attempts: tuple[datetime, ...] = ()
    failed: datetime | None = None
    gave_up: datetime | None = None
    silent: dict[str, Silence] = {}


class Starts(_Frozen):
    """How often the container of an instance was started again since its generation was promoted.

    Attributes:
        again: how often, as far as runs know.
        run: its run that they know of; empty if they don't.
    """

    again: int = 0
    run: str = ""

    def is_outside(self, run: str) -> bool:
        """Tell whether a run of its container was started by nobody who counts: by hand, or by a
        run that was killed."""
        return bool(self.run) and run != self.run

    def restarts(self, run: str) -> int:
        """Return how often it was started again, if this is its run: several starts outside can't
        be told from one."""
        return self.again + self.is_outside(run)


class Record(_Frozen):
    """What became of the releases.

    Attributes:
        sequence: counts changes; the highest one counts.
        serving: the generation that serves, or is to.
        hosts: all hosts, by address, on which anything of the deployment may be.
        outcomes: by generation.
        quarantine: by digest.
        images: what images say of themselves, by digest and architecture.
        closed: since when clients can't connect; None while the service is up.
        hold: who keeps runs from working on it; None if nobody does.
        attempts: the last runs that changed what serves or failed, the latest last.
        starts: by instance of what serves, how often it was started again; older versions counted
            nothing.
        mending: what health has tried since it was deployed; None for nothing.
        figures: those of the last benchmarks, the latest last.
        adopted: a service of somebody else's that this one takes over; it serves for as long as
            `serving` is None.
    """

    sequence: int = 0
    serving: str | None = None
    hosts: dict[str, HostAccess] = {}
    outcomes: dict[str, Outcome] = {}
    quarantine: dict[str, Quarantined] = {}
    images: dict[str, dict[str, ImageFacts]] = {}
    closed: datetime | None = None
    hold: Hold | None = None
    attempts: tuple[Attempt, ...] = ()
    starts: dict[str, Starts] = {}
    mending: Mending | None = None
    figures: tuple[Figures, ...] = ()
    adopted: AdoptedService | None = None

    @property
    def adopted_serving(self) -> AdoptedService | None:
        """The adopted service, if it is what serves, or is to."""
        return self.adopted if self.serving is None else None

    @property
    def serving_name(self) -> str | None:
        """What serves, or is to, for people to read."""
        return SHOWN if self.adopted_serving else self.serving

    def adopting(self, service: AdoptedService | None) -> "Record":
        """Take over a service of somebody else's, or forget it."""
        return self if service == self.adopted else self._changed(adopted=service)

    def returned(self, when: datetime, by: str) -> "Record":
        """Note that the adopted service serves again."""
        if self.serving is None:
            return self.opened()
        good = Outcome(result="good", when=when, by=by)
        image = self.adopted.image if self.adopted else ""
        attempts = self._with(good, ADOPTED, image)
        return self._changed(serving=None, closed=None, starts={}, attempts=attempts)

    def promoted(self, generation: str, when: datetime, by: str, image: str = "") -> "Record":
        """Make a generation that passed all gates the one that serves, unless it is already.

        An image that serves is not quarantined any longer; the caller lifts that by digest.
        """
        before = self.outcomes.get(generation)
        if self.serving == generation and before and before.result == "good":
            return self
        good = Outcome(result="good", when=when, by=by)
        outcomes, attempts = (
            {**self.outcomes, generation: good},
            self._with(good, generation, image),
        )
        return self._changed(serving=generation, outcomes=outcomes, attempts=attempts)

    def restarted(
        self, instances: Iterable[str], when: datetime, by: str, image: str = ""
    ) -> "Record":
        """Add a run that started instances of what serves again, if it did."""
        if not (names := ", ".join(sorted(instances))) or self.serving is None:
            return self
        good = Outcome(result="good", when=when, by=by, reason=f"restarted {names}")
        return self._changed(attempts=self._with(good, self.serving, image))

    def counting(self, runs: Mapping[str, str], started: Collection[str]) -> "Record":
        """Begin to count how often the instances of what was promoted now are started again.

        Args:
            runs: which run of its container each is; empty where that is not known.
            started: those that were started for it; others go on to be counted.
        """
        others = {name: s for name, s in self.starts.items() if name not in started}
        starts = {name: others.get(name) or Starts(run=run) for name, run in runs.items()}
        return self if starts == self.starts else self._changed(starts=starts)

    def counted(
        self, started: Mapping[str, int], before: Mapping[str, str], now: Mapping[str, str]
    ) -> "Record":
        """Count starts of what serves; what was not counted from its promotion on never is.

        Args:
            started: how often each instance was started.
            before: which run of its container each was before that, if it had one.
            now: which one it is since; left out where that is not known.
        """
        counted = {
            name: Starts(
                again=known.restarts(before.get(name, known.run)) + times, run=now.get(name, "")
            )
            for name, times in started.items()
            if (known := self.starts.get(name))
        }
        return self._changed(starts={**self.starts, **counted}) if counted else self

    def on(self, accesses: Iterable[HostAccess]) -> "Record":
        """Add hosts on which something of the deployment is about to be."""
        hosts = {**self.hosts, **{access.address: access for access in accesses}}
        return self if hosts == self.hosts else self._changed(hosts=hosts)

    def left(self, addresses: Iterable[str]) -> "Record":
        """Drop hosts on which nothing of the deployment is any more."""
        gone = set(addresses)
        hosts = {address: host for address, host in self.hosts.items() if address not in gone}
        return self if hosts == self.hosts else self._changed(hosts=hosts)

    def ended(self, generation: str, outcome: Outcome, image: str = "") -> "Record":
        """Add how an attempt ended; a generation that was good before stays good."""
        before = self.outcomes.get(generation)
        if before and before.result == "good":
            return self
        return self._changed(
            outcomes={**self.outcomes, generation: outcome},
            attempts=self._with(outcome, generation, image),
        )

    def failed(self, outcome: Outcome, began: datetime) -> "Record":
        """Add a run that failed, unless what it has done since it began is listed already."""
        latest = self.attempts[-1] if self.attempts else None
        if latest and latest.by == outcome.by and latest.when >= began:
            return self
        return self._changed(attempts=self._with(outcome))

    def _with(self, outcome: Outcome, generation: str = "", image: str = "") -> tuple[Attempt, ...]:
        """Add to the attempts; the oldest of too many go."""
        attempt = Attempt(
            result=outcome.result,
            when=outcome.when,
            by=outcome.by,
            reason=_first_line(outcome.reason),
            generation=generation,
            image=image,
        )
        return (*self.attempts, attempt)[-ATTEMPTS:]

    def quarantined(self, digest: str, why: Quarantined) -> "Record":
        """Put an image into quarantine; the oldest of too many leave it.

        The record is read and written at each run, and a service may live for years.
        """
        entries = {**self.quarantine, digest: why}.items()
        youngest = sorted(entries, key=lambda entry: entry[1].when)[-QUARANTINE:]
        return self._changed(quarantine=dict(youngest))

    def released(self, digest: str) -> "Record":
        """Take an image out of quarantine."""
        if digest not in self.quarantine:
            return self
        others = {key: why for key, why in self.quarantine.items() if key != digest}
        return self._changed(quarantine=others)

    def facts_of(self, digest: str) -> FactsOfImage:
        """Return what an image says of itself, as far as it was asked all that is asked now."""
        answers = self._answers_of(digest).items()
        return {name: facts for name, facts in answers if not facts.silence}

    def silent_on(self, digest: str) -> frozenset[str]:
        """List the architectures for which an image was asked what it is, and did not say."""
        return frozenset(n for n, facts in self._answers_of(digest).items() if facts.silence)

    def _answers_of(self, digest: str) -> FactsOfImage:
        answers = self.images.get(digest, {}).items()
        return {name: facts for name, facts in answers if facts.questions == QUESTIONS}

    def asked(self, digest: str, facts: FactsOfImage) -> "Record":
        """Add what an image says of itself; of too many, forget the one that was asked first."""
        others = {key: known for key, known in self.images.items() if key != digest}
        images = [*others.items(), (digest, {**self._answers_of(digest), **facts})]
        return self._changed(images=dict(images[-IMAGES:]))

    def measured(self, figures: Figures | None) -> "Record":
        """Add the figures of a benchmark, if there was any; the oldest of too many go."""
        if figures is None or figures in self.figures:
            return self
        return self._changed(figures=(*self.figures, figures)[-benchmark.KEPT :])

    def closing(self, when: datetime) -> "Record":
        """Note since when clients can't connect; a service that is down already stays so."""
        return self if self.closed else self._changed(closed=when)

    def opened(self) -> "Record":
        """Note that clients can connect."""
        return self._changed(closed=None) if self.closed else self

    def held(self, hold: Hold | None) -> "Record":
        """Keep all runs from working on the deployment, or let them again."""
        return self if hold == self.hold else self._changed(hold=hold)

    def mended(self, when: datetime) -> "Record":
        """Add an attempt of health's to restart what has failed."""
        attempts = (*(self.mending or Mending()).attempts, when)[-ATTEMPTS:]
        return self._changed(mending=Mending(attempts=attempts))

    def not_mended(self, began: datetime, when: datetime) -> "Record":
        """Note that health's attempt failed."""
        before = self.mending or Mending()
        attempts = before.attempts if began in before.attempts else (*before.attempts, began)
        mending = before.model_copy(update={"attempts": attempts[-ATTEMPTS:], "failed": when})
        return self._changed(mending=mending)

    def gave_up(self, when: datetime) -> "Record":
        """Note that health tries no more."""
        before = self.mending or Mending()
        return self._changed(mending=before.model_copy(update={"gave_up": when}))

    def heard(self, silent: Mapping[str, Silence]) -> "Record":
        """Note what gave no answer at a check."""
        before = self.mending or Mending()
        if before.silent == silent:
            return self
        return self._changed(mending=before.model_copy(update={"silent": dict(silent)}))

    def well(self) -> "Record":
        """Note that all is well again, so that health will try again; its attempts still count."""
        before = self.mending
        if before is None or not (before.failed or before.gave_up or before.silent):
            return self
        return self._changed(mending=Mending(attempts=before.attempts))

    def rested(self) -> "Record":
        """Let health begin anew: somebody has seen to the service."""
        return self._changed(mending=None) if self.mending else self

    def without(self, generations: Iterable[str]) -> "Record":
        """Forget generations that are removed."""
        gone = set(generations)
        kept = {name: outcome for name, outcome in self.outcomes.items() if name not in gone}
        return self if kept == self.outcomes else self._changed(outcomes=kept)

    def _changed(self, **update: object) -> "Record":
        return self.model_copy(update={"sequence": self.sequence + 1, **update})


@dataclass(frozen=True)
class History:
    """All that the hosts know of a deployment's past.

    Attributes:
        record: the newest one found.
        releases: by generation.
        generations: names of all generations of which anything is on a host.
        lease: the highest number that a host's lease is known to have had.
    """

    record: Record
    releases: Mapping[str, Release]
    generations: frozenset[str]
    lease: int = 0

    def last_digest(self, image: str) -> str | None:
        """Return the digest that an image's tag had when it was last deployed, if it was."""
        deployed = [release for release in self.releases.values() if release.chosen_image == image]
        return max(deployed, key=_age).digest if deployed else None

    @property
    def serving(self) -> Release | None:
        """The release that serves, or is to."""
        return self.releases.get(self.record.serving or "")

    @property
    def good(self) -> list[str]:
        """Generations that passed all gates, the last promoted last."""
        outcomes = self.record.outcomes.items()
        promoted = [(outcome.when, name) for name, outcome in outcomes if outcome.result == "good"]
        return [name for _, name in sorted(promoted) if name in self.releases]

    def with_release(self, release: Release) -> "History":
        """Add a release."""
        releases = {**self.releases, release.generation: release}
        return replace(self, releases=releases, generations=self.generations | {release.generation})

    def before(self) -> str | None:
        """Return the good generation that served before the present one: where a rollback goes."""
        others = [name for name in self.good if name != self.record.serving]
        return others[-1] if others else None

    def pruned(self, count: int) -> "History":
        """Leave out what pruning removes; see `kept`."""
        kept = self.kept(count)
        releases = {name: release for name, release in self.releases.items() if name in kept}
        return replace(self, releases=releases, generations=self.generations & kept)

    def kept(self, count: int) -> set[str]:
        """List the generations that pruning keeps: what serves, the last `count` good ones besides,
        the youngest, whatever became of it, and those whose servers these run."""
        others = [name for name in self.good if name != self.record.serving]
        names = {*others[-count:], *filter(None, [self.record.serving])}
        if youngest := latest(self.generations):
            names.add(str(youngest))
        return names | {self.releases[name].servers for name in names if name in self.releases}


@dataclass(frozen=True)
class Choice:
    """The image that a run takes, and the rule by which.

    Attributes:
        digest: None until it is looked up.
        last_digest: the one that its tag had when it was deployed last.
        newer_tags: tags that seem newer, but are of forms that `update` does not take.
    """

    chosen_image: str
    digest: str | None
    rule: str
    last_digest: str | None = None
    newer_tags: tuple[str, ...] = ()


def choose(file_image: str, requested_image: str | None, serving: Release | None) -> Choice:
    """Choose the image of a run that does not ask for the newest.

    One that the run names wins. Otherwise the promoted image stays, so that a manual run never
    undoes a nightly one, unless the file's own `image` has changed since.
    """
    if requested_image is not None:
        return Choice(requested_image, None, "the run names it")
    if serving is None:
        return Choice(file_image, None, "the file's own")
    if serving.file_image != file_image:
        return Choice(file_image, None, f"the file's own, changed since {serving.generation}")
    if serving.chosen_image == file_image:
        return Choice(
            serving.chosen_image, serving.digest, f"the file's own, as {serving.generation}"
        )
    return Choice(
        serving.chosen_image,
        serving.digest,
        f"promoted with {serving.generation}; the file's is older",
    )


def merge(
    records: Iterable[Record],
    releases: Iterable[Release],
    names: Iterable[str],
    lease: int = 0,
) -> History:
    """Merge what each host knows into one history."""
    newest = max(records, key=lambda record: record.sequence, default=Record())
    by_generation = {release.generation: release for release in releases}
    valid = frozenset(name for name in names if Generation.parse(name))
    return History(newest, by_generation, valid | frozenset(by_generation), lease)


def digest_of(pinned_image: str) -> str:
    """Return the digest in `repository@sha256:…`, or the id itself."""
    return pinned_image.rpartition("@")[2]


def local_tag(deployment: str, generation: str) -> str:
    """Make the tag that keeps a kept generation's image on a host from being pruned."""
    return f"pd-deploy/{deployment}:{generation}"


def table(
    history: History, running: Collection[str] | None = None, is_whole: bool = True
) -> Sequence[Mapping[str, str]]:
    """List the releases as rows, the youngest first.

    Args:
        running: the generations of which containers run, if that was looked at.
        is_whole: whether all of what serves does.
    """
    releases = sorted(history.releases.values(), key=_age, reverse=True)
    rows = [_row(history, release, running, is_whole) for release in releases]
    empty = dict.fromkeys(rows[0], "") if rows else {}
    return [*rows, *({**empty, **row} for row in _adopted_rows(history.record, is_whole))]


def _adopted_rows(record: Record, is_whole: bool) -> list[Mapping[str, str]]:
    service = record.adopted
    if service is None:
        return []
    result = "kept"
    if record.adopted_serving:
        result = "serving" if is_whole else "does not serve as a whole"
    return [
        {
            "generation": SHOWN,
            "created": f"{service.when:%Y-%m-%d %H:%M:%S}",
            "image": service.image,
            "digest": "",
            "contract": "",
            "started by": f"somebody else; adopted by {service.by}",
            "result": result,
            "ended": "",
            "cause": "",
        }
    ]


def attempts(history: History) -> Sequence[Attempt]:
    """List the runs that changed what serves or failed, the latest first; what is known of older
    ones, from before there was a list of them, too."""
    listed = {(a.generation, a.when) for a in history.record.attempts}
    older = [
        Attempt(
            result=outcome.result,
            when=outcome.when,
            by=outcome.by,
            reason=_first_line(outcome.reason),
            generation=name,
            image=history.releases[name].chosen_image if name in history.releases else "",
        )
        for name, outcome in history.record.outcomes.items()
        if (name, outcome.when) not in listed
    ]
    return sorted([*older, *history.record.attempts], key=lambda a: a.when, reverse=True)


def _age(release: Release) -> Generation:
    parsed = Generation.parse(release.generation)
    assert parsed is not None
    return parsed


def _row(
    history: History, release: Release, running: Collection[str] | None, is_whole: bool
) -> Mapping[str, str]:
    outcome = history.record.outcomes.get(release.generation)
    serves = history.record.serving == release.generation
    result: str = outcome.result if outcome else "unfinished"
    if serves:
        runs = running is None or {release.generation, release.servers} <= set(running)
        opened = "serving" if is_whole else "serving in part"
        if history.record.closed:
            opened = "promoted, does not serve"
        result = opened if runs else "promoted, does not run"
    if release.digest in history.record.quarantine:
        result += ", image quarantined"
    row = {
        "generation": release.generation,
        "created": f"{release.created:%Y-%m-%d %H:%M:%S}",
        "image": release.chosen_image,
        "digest": release.digest[:19],
        "contract": release.contract,
        "changed": release.changed,
        "started by": release.started_by,
        "result": result,
        "ended": f"{outcome.when:%Y-%m-%d %H:%M:%S}" if outcome else "",
        "cause": _first_line(outcome.reason) if outcome else "",
    }
    if history.record.figures:
        figures = benchmark.of_generation(history.record.figures, release.generation)
        row["benchmark"] = str(figures) if figures else ""
    return row


def _first_line(text: str) -> str:
    line = re.sub(r"\s+", " ", text.strip().partition("\n")[0])
    return line if len(line) <= 200 else f"{line[:199]}…"
