"""Plans and releases as the command prints them for people to read."""

import json
from collections.abc import Mapping, Sequence

from pd_deploy.cli.hosts import Past
from pd_deploy.cli.tables import aligned
from pd_deploy.planning.plans import HostPlan, Plan, PlannedFile
from pd_deploy.records import generations, releases

_BELOW = ("started by", "changed", "cause", "benchmark")
"""What is told of a release below its row, because it may be long."""


def release_table(past: Past) -> str:
    """Print the releases as a table, the images in quarantine, and what is not as it should be."""
    history, running = past.history, past.running
    rows = releases.table(
        history,
        {state.labels.get(generations.GENERATION, "") for state in running},
        past.status.serves,
    )
    away = past.away
    if not rows and running:
        names = ", ".join(f"{state.name} of image {state.image}" for state in running)
        lost = f"no host knows what was deployed, but these containers run: {names}"
        return "\n".join([lost, *away])
    if not rows:
        return "\n".join(["nothing has been deployed yet", *away])
    lines = _releases(rows)
    for digest, entry in history.record.quarantine.items():
        lines.append(f"in quarantine: {entry.image} ({digest[:19]}): {entry.reason}")
    if past.status.verdict and not past.status.serves:
        lines.append(f"{past.status.verdict}: {past.status.state}")
    return "\n".join(lines)


def _releases(rows: Sequence[Mapping[str, str]]) -> list[str]:
    columns = [name for name in rows[0] if name not in _BELOW]
    short = [{**row, "image": _name(row["image"])} for row in rows]
    heading, *lines = aligned([tuple(columns), *(tuple(row[c] for c in columns) for row in short)])
    listed = [heading]
    for row, line in zip(rows, lines, strict=True):
        listed.append(line)
        listed += [f"  {name}: {row[name]}" for name in _BELOW if row.get(name)]
    return listed


def _name(image: str) -> str:
    return image.rpartition("/")[2]


def attempt_table(past: Past) -> str:
    """Print the runs that changed what serves or failed as a table, the latest first."""
    attempts = releases.attempts(past.history)
    away = past.away
    if not attempts:
        return "\n".join(["no run has changed or tried anything yet", *away])
    rows = [("when", "result", "generation", "image", "started by", "cause")]
    rows += [
        (
            f"{a.when.astimezone():%Y-%m-%d %H:%M:%S}",
            a.result,
            a.generation,
            _name(a.image),
            a.by,
            a.reason,
        )
        for a in attempts
    ]
    return "\n".join([*aligned(rows), *away])


def attempts_document(past: Past) -> str:
    """Write the runs that changed what serves or failed for programs."""
    attempts = releases.attempts(past.history)
    return json.dumps([attempt.model_dump(mode="json") for attempt in attempts], indent=2)


def plan(made: Plan, said: str = "", *, full: bool = True) -> str:
    """Print what a plan's image is, then what it would do on each host; with `full`, all that it
    makes, too."""
    lines = [f"{made.deployment}: generation {made.generation}", f"image {made.pinned_image}"]
    lines += [said] if said else []
    for name, host in made.hosts.items():
        of_host = _host(host) if full else _actions(host)
        lines += ["", f"== host {name} ({host.address})", *of_host]
    return "\n".join(lines)


def _actions(host: HostPlan) -> list[str]:
    return [f"would {a.verb} {a.subject}" for a in host.actions] or ["nothing to do"]


def _host(host: HostPlan) -> list[str]:
    lines = _actions(host)
    lines += ["", *(f"directory {path}" for path in host.directories)]
    for name, instance in host.instances.items():
        lines += ["", f"-- container {instance.container.name} ({name})"]
        settings = instance.container.model_dump(exclude={"name"}, exclude_defaults=True)
        for key, value in settings.items():
            lines += _setting(key, value)
    for name, instance in host.instances.items():
        command = instance.command
        lines += ["", f"-- {name} runs", "   " + " ".join(map(_word, command.argv))]
        lines += [f"   {key}={value}" for key, value in command.environment.items()]
    for instance in host.instances.values():
        lines += _file(instance.start_script, "launch")
    for file in host.ranktables.files if host.ranktables else ():
        lines += _file(file, "ranktable")
    return lines


def _file(file: PlannedFile, stage: str) -> list[str]:
    lines = ["", f"-- file {file.path} (mode {file.mode}, stage {stage})"]
    return lines + [f"   | {line}" for line in file.content.splitlines()]


def _setting(key: str, value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"   {key}:", *(f"     {k}={v}" for k, v in value.items())]
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return [f"   {key}:", *(f"     {_entry(entry)}" for entry in value)]
    if isinstance(value, list | tuple):
        return [f"   {key}: {' '.join(map(str, value))}"]
    return [f"   {key}: {value}"]


def _entry(entry: dict[str, object]) -> str:
    if "source" not in entry:
        return " ".join(f"{key}={value}" for key, value in entry.items())
    mode = " (read only)" if entry.get("read_only") else ""
    return f"{entry['source']} → {entry['target']}{mode}"


def _word(word: str) -> str:
    return repr(word) if " " in word else word
