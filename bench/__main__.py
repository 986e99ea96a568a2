"""`python -m bench`: bring up a 3P1D on a lab several times, and print how long each part took.

The control plane's own time is that of the flow run, less the time spent waiting for the engine
alone. Everything that is started is taken down again.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable

from bench.command import measured, say
from bench.service import Upgrade, on_lab
from bench.timeline import Measured

EXPECTED_S = 8.0  # own time of a run on clean hosts, on 2 idle cores
EXPECTED_REST_S = 3.0  # downtime of an upgrade besides the engine's load time
EXPECTED = f"expected on clean hosts: {EXPECTED_S:g} or less"
ENGINE_MEANS = "from Docker's start of the last server to the last 200 on /health"
MEANING = {
    "connect": "log in, and read what was deployed before",
    "lock": "the lease on both hosts",
    "survey": "facts, containers, device addresses, image digest",
    "preflight": "paths, disk, devices and ports of both hosts",
    "image present": "look for the image",
    "clean up": "look for what must stop first; wait for devices and ports",
    "launch": "directories, start scripts, containers",
    "ranktable": "ranktable documents",
    "start": "decode, prefills and proxy, until the last server is started",
    "ready": "notice that all servers are ready",
    "open proxy": "let nginx open its port",
    "smoke test": "completions through the proxy, and proof that KV was transferred",
    "benchmark": "the load of `gates.benchmark`, if the file has one",
    "promote": "record it, remove old generations",
    "between steps": "Prefect: task states, report, artifacts",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs of a bench; `pull` is in seconds."""

    pull: float
    runs: list[Measured]
    again: list[Measured]
    upgrades: list[Upgrade]


def bench(runs: int) -> Result:
    """Measure runs on clean hosts, each followed by one that finds nothing to do."""
    say("starting a lab and a Prefect server (a minute or two the first time)")
    with on_lab() as service:
        first = service.bring_up()
        say(f"warm-up, with the pull: {first.wall:.1f} s")
        up, again, upgrades = [], [], []
        for number in range(1, runs + 1):
            service.clean()
            up.append(service.bring_up())
            again.append(service.run_again())
            say(f"run {number} of {runs}: {up[-1].wall:.1f} s, again: {again[-1].wall:.1f} s")
        for number in range(1, runs + 1):
            upgrades.append(service.upgrade(number))
            say(f"upgrade {number} of {runs}: down for {upgrades[-1].down:.1f} s")
        say("taking the lab down")
    return Result(first.parts["image present"], up, again, upgrades)


def table(result: Result) -> str:
    """Format the result as a table for people."""
    own = statistics.median(run.own for run in result.runs)
    verdict = "met" if own <= EXPECTED_S else "MISSED"
    rows = [
        _row("flow run, start to end", result, lambda run: run.wall, "as Prefect's API has it"),
        _row("- engine loads", result, lambda run: run.engine, ENGINE_MEANS),
        _row("= control plane itself", result, lambda run: run.own, f"{EXPECTED}: {verdict}"),
        *(_part_row(part, meaning, result) for part, meaning in MEANING.items()),
    ]
    return "\n".join(
        [
            "3 prefill + 1 decode + 1 proxy on two simulated hosts, "
            f"{os.cpu_count()} cores, {len(result.runs)} times",
            "",
            f"{'':26}------ clean hosts ------      run again",
            f"{'seconds':26}{'min':>7}{'median':>9}{'max':>9}{'median':>15}",
            *rows,
            "",
            *_upgrades(result.upgrades),
            "",
            f"The image was pulled to both hosts beforehand, in {result.pull:.1f} s.",
            "`run again` finds nothing to change, and proves the service.",
            "Each moment counts for the earliest step under way on any host, so the parts add up",
            "to the control plane's own time, without starting Python and importing Prefect.",
        ]
    )


def as_json(result: Result) -> str:
    """Format the result for programs: each run by itself, in seconds."""
    return json.dumps(
        {
            "expected_own": EXPECTED_S,
            "cores": os.cpu_count(),
            "pull": result.pull,
            "runs": [dataclasses.asdict(run) | {"own": run.own} for run in result.runs],
            "again": [dataclasses.asdict(run) for run in result.again],
            "upgrades": [dataclasses.asdict(upgrade) for upgrade in result.upgrades],
        },
        indent=2,
    )


def main() -> int:
    """Run the command; return 0 if all runs went well."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--runs", type=_at_least_one, default=3, help="how often (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args()
    result = measured("bench", lambda: bench(options.runs))
    print(as_json(result) if options.json else f"\n{table(result)}")
    return 0


def _upgrades(upgrades: list[Upgrade]) -> list[str]:
    down = statistics.median(upgrade.down for upgrade in upgrades)
    rest = statistics.median(upgrade.down - upgrade.load for upgrade in upgrades)
    verdict = "met" if rest <= EXPECTED_REST_S else "MISSED"
    return [
        f"During an upgrade, a client that keeps asking gets no completion for {down:.1f} s, of "
        f"which {rest:.1f} s",
        f"are not the engine's load time (expected: {EXPECTED_REST_S:g} or less: {verdict}).",
    ]


def _part_row(part: str, meaning: str, result: Result) -> str:
    return _row(f"    {part}", result, lambda run: run.parts[part], meaning)


def _row(name: str, result: Result, value: Callable[[Measured], float], meaning: str) -> str:
    clean = [value(run) for run in result.runs]
    again = statistics.median(value(run) for run in result.again)
    columns = f"{min(clean):7.2f}{statistics.median(clean):9.2f}{max(clean):9.2f}{again:15.2f}"
    return f"{name:26}{columns}   {meaning}"


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
