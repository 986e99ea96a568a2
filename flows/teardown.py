"""Removing a deployment."""

from pathlib import Path

from prefect import State, flow
from prefect.states import Completed

from flows import publish
from flows.fan_out import fan_out
from flows.roll_out import look
from flows.run import this_run
from flows.session import at_work
from pd_deploy.config.load import load_deployment
from pd_deploy.steps import surveying
from tasks.tidy import clear, stop


@flow(name="pd-teardown", flow_run_name=publish.run_name, persist_result=False)
async def teardown(file: str) -> State[None]:
    """Removes a deployment completely, and only it: containers, files, logs and its images.

    Args:
        file: the deployment file; says which deployment, and how its hosts are reached.
    """
    given = load_deployment(Path(file))
    async with at_work(given, str(this_run())) as site:
        past = surveying.past_of(await look(site))
        proxy_first = sorted(site.hosts, key=lambda name: name != site.topology.proxy.host)
        for name in proxy_first[:1]:
            await stop(site, name)
        done = await fan_out(site.barrier, [clear(site, name, past) for name in proxy_first])
    what = "; ".join(f"{one.host}: {one.detail}" for one in done)
    return Completed(message=f"{given.name} is gone: {what}")
