"""The steps of a rollout in order: those while the old generation still serves, the cut-over, and
those after it."""

import time
from collections.abc import Sequence

from pd_deploy.config.topology import Topology
from pd_deploy.flows.line import Line
from pd_deploy.planning.plans import STAGES, Stage
from pd_deploy.steps import promotion, timeline, waiting_room
from pd_deploy.steps.readiness import ALL_STARTED
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.verify.benchmark import is_due
from pd_deploy.steps.verify.smoke import Completion
from pd_deploy.tasks import (
    benchmark,
    bring_code,
    check_host,
    clean_up,
    compare_hosts,
    find_load_generator,
    launch,
    open_proxy,
    prepare_proxy,
    prepare_waiting_room,
    pull_image,
    save,
    smoke_test,
    start_server,
    until_free,
    until_ready,
    write_ranktables,
)
from pd_deploy.tasks.step import Result


async def run_stages(line: Line, rollout: Rollout, stages: list[Stage]) -> None:
    """Run the stages. Stop nothing old before every host has passed its checks and has everything
    that the new generation needs."""
    await prepare_all(line, rollout, stages)
    await stop_old(line, rollout, stages)
    if "server" in stages:
        await serve_all(line, rollout)
    elif "proxy" in stages:
        await prepare(line, rollout)


async def prepare_all(line: Line, rollout: Rollout, stages: list[Stage]) -> None:
    """Do everything that can be done while the old generation serves."""
    rollout.session.timeline.enter(timeline.PREPARE)
    hosts = list(rollout.plan.hosts)
    await line.together(check_host.after(*line.ends)(rollout, host) for host in hosts)
    await line.together([compare_hosts.after(*line.ends)(rollout, line.reports[-len(hosts) :])])
    # Where a generation comes back, there is nothing to make, and clients wait.
    is_whole = set(stages) == set(STAGES)
    to_make = [host for host in hosts if not (is_whole and rollout.is_made(host))]
    if "cleanup" in stages or "launch" in stages:
        await line.together(pull_image.after(*line.ends)(rollout, host) for host in to_make)
        await line.joined("image on all hosts")
    if {"launch", "proxy"} <= set(stages) and is_due(rollout):
        await line.together([find_load_generator.after(*line.ends)(rollout)])
    if "launch" in stages and any(map(rollout.code_on, hosts)):
        await line.together(bring_code.after(*line.ends)(rollout, host) for host in hosts)
        await line.joined("code on all hosts")
    if "launch" in stages:
        await promotion.note_hosts(rollout)
    await line.branches(create(line.branch(), rollout, host, stages) for host in to_make)
    await line.joined("containers and files made")
    proxies, steps = rollout.session.topology.proxies, []
    if "launch" in stages and "proxy" in stages:
        early = [proxy.name for proxy in proxies if rollout.may_prepare_early(proxy.name)]
        steps += [prepare_proxy.after(*line.ends)(rollout, name) for name in early]
    if not is_whole:
        await waiting_room.dismiss(rollout)
    else:
        held = [proxy.name for proxy in proxies if waiting_room.is_wanted(rollout, proxy)]
        steps += [prepare_waiting_room.after(*line.ends)(rollout, name) for name in held]
    await line.together(steps)


async def create(line: Line, rollout: Rollout, host: str, stages: list[Stage]) -> Line:
    """Make files and containers on one host; start nothing."""
    planned = rollout.plan.hosts[host]
    if "launch" in stages:
        await line.together([save.after(*line.ends)(rollout, host)])
        await line.together(
            launch.after(*line.ends)(rollout, instance) for instance in planned.instances
        )
    if "ranktable" in stages and planned.ranktables:
        await line.together([write_ranktables.after(*line.ends)(rollout, host)])
    return line


async def stop_old(line: Line, rollout: Rollout, stages: list[Stage]) -> None:
    """Cut over: stop what must no longer run, proxies first, then the servers; all at once where
    no client can be served any more."""
    rollout.session.timeline.enter(timeline.CUT_OVER)
    if "cleanup" in stages:
        proxies, servers = rollout.to_clean_up()
    elif "server" in stages:
        proxies, servers = rollout.to_restart()
    else:
        return
    if (rollout.stopping or rollout.leaving) and not rollout.stays_open:
        await promotion.note_closing(rollout)
    if not rollout.may_cut:
        await line.together(clean_up.after(*line.ends)(rollout, proxy) for proxy in proxies)
        await line.joined("proxies stopped")
        proxies = []
    names = [*proxies, *servers]
    await line.together(clean_up.after(*line.ends)(rollout, name) for name in names)
    await line.joined("old generation stopped")


async def serve_all(line: Line, rollout: Rollout) -> None:
    """Start all servers when what they need is free, and wait until all are ready."""
    rollout.session.timeline.enter(timeline.SERVE)
    busy = [host for host in rollout.plan.hosts if rollout.to_start(host)]
    await line.together(until_free.after(*line.ends)(rollout, host) for host in busy)
    await line.joined("devices and ports free")
    session = rollout.session
    topology, starts_after = session.topology, session.engine.starts_after
    first = {i.name: starts_after(session.deployment, topology, i.name) for i in topology.instances}
    gates = {group: _started(topology, group) for group in dict.fromkeys(first.values()) if group}
    servers = [serve(line, rollout, name, gates.get(group)) for name, group in first.items()]
    joins = [all_started(line, gate, group) for group, gate in gates.items()]
    timed = time_loading(line, list(first))
    await line.branches([*servers, *joins, timed, prepare_beside(line.branch(), rollout)])


async def serve(line: Line, rollout: Rollout, instance: str, gate: str | None) -> Line:
    """Start a server once the gate of those that it has to follow, if any, is open; wait until it
    is ready."""
    followed = await line.barrier.passed([gate] if gate else [])
    branch = line.branch(*followed)
    await branch.together([start_server.after(*branch.ends)(rollout, instance)])
    line.barrier.open(instance, branch.ends[0])
    await branch.together([until_ready.after(*branch.ends)(rollout, instance)])
    return branch


async def time_loading(line: Line, servers: list[str]) -> Line:
    """Let the time for loading begin when all servers are started: they wait for each other."""
    await line.barrier.passed(servers)
    line.barrier.open(ALL_STARTED, None)
    return line.branch()


async def all_started(line: Line, gate: str, servers: tuple[str, ...]) -> Line:
    """Open one gate for all instances that start after the same servers."""
    passed = await line.barrier.passed(servers)
    join = Line(line.barrier, line.timeline, *passed)
    await join.joined(gate)
    line.barrier.open(gate, join.ends[0])
    return join


def _started(topology: Topology, servers: tuple[str, ...]) -> str:
    roles = dict.fromkeys(i.role for i in map(topology.instance, servers) if i)
    return f"{' and '.join(roles)} started"


async def prove_and_open(line: Line, rollout: Rollout) -> Completion:
    """Prove the service where only the smoke test can reach it, then let clients in. A new
    generation has to carry the load of `gates.benchmark` before: clients meet no slow one, and
    their requests don't disturb its figures."""
    rollout.session.timeline.enter(timeline.SERVE)
    begin = time.monotonic()
    completion = await smoke_test.after(*line.ends)(rollout)
    rollout.attempt.downtime.proof = time.monotonic() - begin
    passed: Sequence[Result] = [completion]
    if is_due(rollout):
        await line.together([benchmark.after(completion)(rollout)])
        passed = line.ends
    proxies = rollout.session.topology.proxy_names
    await line.together(open_proxy.after(*passed)(rollout, name) for name in proxies)
    return completion


async def prepare_beside(line: Line, rollout: Rollout) -> Line:
    """Prepare the proxies while the servers load. Servers that have to start do so first: they load
    longest, and preparing proxies would slow their start down."""
    starting = (planned for host in rollout.plan.hosts for planned in rollout.to_start(host))
    if any(planned.role != "proxy" for planned in starting):
        await line.barrier.passed([ALL_STARTED])
    return await prepare(line, rollout)


async def prepare(line: Line, rollout: Rollout) -> Line:
    """Prepare the proxies; keep their ports closed."""
    proxies = rollout.session.topology.proxy_names
    await line.together(prepare_proxy.after(*line.ends)(rollout, name) for name in proxies)
    return line
