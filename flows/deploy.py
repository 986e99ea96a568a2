"""The runbook: bring a service up and prove that it serves."""

from pathlib import Path
from typing import Any

from prefect import State, flow

from flows import publish
from flows.fan_out import fan_out
from flows.site import open_site
from pd_deploy import containers, deployment
from pd_deploy.plan import STAGES, Stage
from pd_deploy.report import Report
from pd_deploy.rollout import Rollout, Site
from pd_deploy.survey import with_addresses
from tasks.clean_up import clean_up
from tasks.image import pull_image, resolve_image
from tasks.launch import launch
from tasks.preflight import preflight
from tasks.proxy import open_proxy, prepare_proxy
from tasks.ranktable import write_ranktables
from tasks.server import start_server, until_ready
from tasks.smoke_test import smoke_test
from tasks.survey import device_addresses, survey


@flow(name="pd-deploy", flow_run_name=publish.run_name, persist_result=False)
async def deploy(
    file: str,
    image: str | None = None,
    stages: list[Stage] | None = None,
    dry_run: bool = False,
) -> State[None]:
    """Brings a service up: prefill, decode and proxy on their hosts, proven by a completion.

    Each step looks first and changes only what is not as it should be, so running it again is
    safe. When it fails, what this run started is stopped again and kept for inspection.

    Args:
        file: the deployment file, relative to the directory of prefect.yaml.
        image: an image to run instead of the file's own.
        stages: run only these, in the order cleanup, launch, ranktable, proxy, server.
        dry_run: report per host what would be done, and change nothing.
    """
    chosen = [stage for stage in STAGES if stages is None or stage in stages]
    async with open_site(deployment.load(Path(file), image=image)) as site:
        rollout = await look(site)
        publish.found(rollout)
        if dry_run:
            return await publish.dry_run(file, rollout, chosen)
        try:
            reports = await make_so(rollout, chosen)
            completion = await smoke_test(rollout, wait_for=reports) if "server" in chosen else None
        except BaseException as error:
            stopped = await containers.stop_started(rollout)
            await publish.failure(file, rollout, error, stopped)
            raise
        return await publish.success(file, rollout, reports, completion)


async def look(site: Site) -> Rollout:
    """Reads everything a plan needs, on all hosts at once; changes nothing."""
    names = list(site.deployment.hosts)
    surveys = await fan_out(site.barrier, [survey(site, name) for name in names])
    reading = [device_addresses(site, name, wait_for=surveys) for name in with_addresses(site)]
    found: list[Any] = await fan_out(
        site.barrier, [resolve_image(site, wait_for=surveys), fan_out(site.barrier, reading)]
    )
    image, addresses = found
    return Rollout(
        site,
        {survey.host: survey for survey in surveys},
        {address.host: address.of_device for address in addresses},
        image.exact,
    )


async def make_so(rollout: Rollout, stages: list[Stage]) -> list[Report]:
    """Runs the stages. Nothing old stops before every host has passed its checks and has the
    image; from then on each host goes at its own pace until the proxy opens."""
    site, hosts = rollout.site, list(rollout.site.deployment.hosts)
    reports = await fan_out(site.barrier, [preflight(rollout, host) for host in hosts])
    if "cleanup" in stages or "launch" in stages:
        reports += await fan_out(
            site.barrier, [pull_image(rollout, host, wait_for=reports) for host in hosts]
        )
    reports += await stop_old(rollout, stages, reports)
    lines = [bring_up(rollout, host, stages, reports) for host in hosts]
    for line in await fan_out(site.barrier, lines):
        reports += line
    if "server" in stages:
        reports += [await open_proxy(rollout, site.topology.proxy.name, wait_for=reports)]
    return reports


async def stop_old(rollout: Rollout, stages: list[Stage], after: list[Report]) -> list[Report]:
    """Stops what must not run any longer: the proxy first, then the servers."""
    if "cleanup" in stages:
        proxies, servers = rollout.to_clean_up()
    elif "server" in stages:
        proxies, servers = rollout.to_restart()
    else:
        return []
    barrier = rollout.site.barrier
    closed = await fan_out(barrier, [clean_up(rollout, name, wait_for=after) for name in proxies])
    stopped = [clean_up(rollout, name, wait_for=closed or after) for name in servers]
    return closed + await fan_out(barrier, stopped)


async def bring_up(
    rollout: Rollout, host: str, stages: list[Stage], after: list[Report]
) -> list[Report]:
    """Everything on one host, up to servers that are ready and a proxy that could open."""
    site, planned = rollout.site, rollout.plan.hosts[host]
    done: list[Report] = []
    if "launch" in stages:
        done += await fan_out(
            site.barrier, [launch(rollout, name, wait_for=after) for name in planned.containers]
        )
    if "ranktable" in stages and planned.files_of("ranktable"):
        done.append(await write_ranktables(rollout, host, wait_for=done or after))
    steps = []
    if "server" in stages:
        steps += [serve(rollout, i.name, done or after) for i in site.topology.on_host(host)]
    if "proxy" in stages and host == site.topology.proxy.host:
        steps += [prepare(rollout, done or after)]
    return done + [report for pair in await fan_out(site.barrier, steps) for report in pair]


async def serve(rollout: Rollout, instance: str, after: list[Report]) -> list[Report]:
    """Starts a server when those it has to follow have started, and waits until it is ready."""
    site = rollout.site
    followed = await site.barrier.passed(site.engine.starts_after(site.topology, instance))
    started = await start_server(rollout, instance, wait_for=[*after, *followed])
    site.barrier.open(instance, started)
    return [started, await until_ready(rollout, instance, wait_for=[started])]


async def prepare(rollout: Rollout, after: list[Report]) -> list[Report]:
    """Prepares the proxy while the servers load."""
    return [await prepare_proxy(rollout, rollout.site.topology.proxy.name, wait_for=after)]
