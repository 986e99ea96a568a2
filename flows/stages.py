"""The steps of a rollout in their order: what is done while the old generation still serves, the
cut-over, and what follows it."""

import time

from pd_deploy.flows.fan_out import fan_out
from pd_deploy.planning.plans import Stage
from pd_deploy.steps import promotion
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.verify.smoke import Completion
from pd_deploy.tasks.clean_up import clean_up
from pd_deploy.tasks.image import pull_image
from pd_deploy.tasks.launch import launch
from pd_deploy.tasks.preflight import preflight, until_free
from pd_deploy.tasks.promote import save
from pd_deploy.tasks.proxy import open_proxy, prepare_proxy
from pd_deploy.tasks.ranktable import write_ranktables
from pd_deploy.tasks.server import start_server, until_ready
from pd_deploy.tasks.smoke_test import smoke_test


async def run_stages(rollout: Rollout, stages: list[Stage]) -> list[Report]:
    """Runs the stages. Nothing old stops before every host has passed its checks and has all that
    the new generation needs."""
    reports = await prepare_all(rollout, stages)
    reports += await stop_old(rollout, stages, reports)
    if "server" in stages:
        reports += await serve_all(rollout, reports)
    elif "proxy" in stages:
        reports += await prepare(rollout, reports)
    return reports


async def prepare_all(rollout: Rollout, stages: list[Stage]) -> list[Report]:
    """All that can be done while the old generation serves."""
    session, hosts = rollout.session, list(rollout.plan.hosts)
    reports = await fan_out(session.barrier, [preflight(rollout, host) for host in hosts])
    if "cleanup" in stages or "launch" in stages:
        pulls = [pull_image(rollout, host, wait_for=reports) for host in hosts]
        reports += await fan_out(session.barrier, pulls)
    if "launch" in stages:
        await promotion.note_hosts(rollout)
    lines = [create(rollout, host, stages, reports) for host in hosts]
    for line in await fan_out(session.barrier, lines):
        reports += line
    if "launch" in stages and "proxy" in stages and rollout.may_prepare_early():
        reports += await prepare(rollout, reports)
    return reports


async def create(
    rollout: Rollout, host: str, stages: list[Stage], after: list[Report]
) -> list[Report]:
    """Files and containers on one host; nothing starts."""
    barrier, planned = rollout.session.barrier, rollout.plan.hosts[host]
    done: list[Report] = []
    if "launch" in stages:
        done.append(await save(rollout, host, wait_for=after))
        done += await fan_out(
            barrier, [launch(rollout, name, wait_for=done) for name in planned.instances]
        )
    if "ranktable" in stages and planned.ranktables:
        done.append(await write_ranktables(rollout, host, wait_for=done or after))
    return done


async def stop_old(rollout: Rollout, stages: list[Stage], after: list[Report]) -> list[Report]:
    """The cut-over: stops what must not run any longer, the proxy first, then the servers."""
    if "cleanup" in stages:
        proxies, servers = rollout.to_clean_up()
    elif "server" in stages:
        proxies, servers = rollout.to_restart()
    else:
        return []
    barrier = rollout.session.barrier
    if rollout.stopping():
        await promotion.note_closing(rollout)
    closed = await fan_out(barrier, [clean_up(rollout, name, wait_for=after) for name in proxies])
    stopped = [clean_up(rollout, name, wait_for=closed or after) for name in servers]
    return closed + await fan_out(barrier, stopped)


async def serve_all(rollout: Rollout, after: list[Report]) -> list[Report]:
    """Starts all servers when what they need is free, and waits until all are ready."""
    session = rollout.session
    busy = [host for host in rollout.plan.hosts if rollout.to_start(host)]
    free = await fan_out(
        session.barrier, [until_free(rollout, host, wait_for=after) for host in busy]
    )
    steps = [serve(rollout, i.name, free or after) for i in session.topology.instances]
    steps += [prepare(rollout, free or after)]
    done = [report for line in await fan_out(session.barrier, steps) for report in line]
    return free + done


async def prove_and_open(rollout: Rollout, after: list[Report]) -> tuple[Completion, list[Report]]:
    """Proves the service where only the smoke test can reach it, then lets clients in."""
    begin = time.monotonic()
    completion = await smoke_test(rollout, wait_for=after)
    rollout.attempt.downtime.proof = time.monotonic() - begin
    proxy = rollout.session.topology.proxy.name
    return completion, [await open_proxy(rollout, proxy, wait_for=[completion])]


async def serve(rollout: Rollout, instance: str, after: list[Report]) -> list[Report]:
    """Starts a server when those it has to follow have started, and waits until it is ready."""
    session = rollout.session
    followed = await session.barrier.passed(session.engine.starts_after(session.topology, instance))
    started = await start_server(rollout, instance, wait_for=[*after, *followed])
    session.barrier.open(instance, started)
    return [started, await until_ready(rollout, instance, wait_for=[started])]


async def prepare(rollout: Rollout, after: list[Report]) -> list[Report]:
    """Prepares the proxy: its port stays closed."""
    return [await prepare_proxy(rollout, rollout.session.topology.proxy.name, wait_for=after)]
