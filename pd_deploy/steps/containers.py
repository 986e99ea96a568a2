"""Changing what runs: stop, launch, start. Each looks first and does nothing where all is right."""

import asyncio
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial

import httpx

from pd_deploy.config.fields import archive_of
from pd_deploy.engines.base import PROVING_ADDRESS
from pd_deploy.errors import (
    Abandoned,
    HostError,
    InstanceDied,
    NotReady,
    OutOfOrder,
)
from pd_deploy.hosts.concurrent import all_ended, task_group, together
from pd_deploy.hosts.container_values import ContainerState, PullProgress
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Host
from pd_deploy.planning.plans import PlannedFile
from pd_deploy.records import generations
from pd_deploy.records.releases import local_tag
from pd_deploy.steps import adopting, host_faults, images, waiting_room
from pd_deploy.steps.patience import patiently
from pd_deploy.steps.report import Report
from pd_deploy.steps.retry import retried
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.stopping import stop, told_of
from pd_deploy.steps.waiting_room_program import HEADER

PROGRESS_LINES = 5  # among which its last one is, also where a progress bar ends in empty ones
LOG_LINES = 20  # of a server that ended, in the error: enough for a traceback's end
ABORT_TIMEOUT_S = 10  # between SIGINT and SIGKILL: what never served has no requests to finish
CONNECT_S = 5.0  # to a port on the host's own network


async def pull(
    rollout: Rollout, name: str, on_progress: Callable[[PullProgress], None] | None = None
) -> Report:
    """Pull the image on a host unless it is there, or send it there from a file; wait for a turn.

    Raises:
        NotReady: it took longer than `gates.pull`.
        WrongArchitecture: its programs are for other machines.
        ImageNotFound: the file holds another image now than when it was planned.
    """
    chosen, pinned = rollout.release.chosen_image, rollout.plan.pinned_image
    state = rollout.states[name]
    verb = await images.bring(rollout.locked, state, chosen, pinned, on_progress)
    if archive_of(chosen):
        await _name(rollout, name)
    detail = f"{verb} {pinned.rpartition('@')[2][:19]}" if verb else "present"
    return Report("pull image", name, name, bool(verb), detail)


async def _name(rollout: Rollout, name: str) -> None:
    """Name an image that came in a file after its generation: it may have no other name, and is
    not to be pruned before it runs."""
    host, image = rollout.session.host(name), rollout.plan.pinned_image
    generation = local_tag(rollout.session.deployment.name, rollout.plan.generation)
    present = await host.docker.image(image)
    if present and generation not in present.tags:
        await rollout.locked.may_change(host)
        await host.docker.tag(image, generation)


async def clean_up(
    rollout: Rollout, instance: str, tell: Callable[[str], None] | None = None
) -> Report:
    """Stop an instance's outdated containers, and an adopted one; keep them for a rollback.

    Args:
        tell: told how many requests are under way while a proxy stops.
    """
    await waiting_room.take_port(rollout, instance)
    stopping = [
        (host, state)
        for host, state in rollout.stopping
        if state.labels[generations.INSTANCE] == instance
    ]
    leaving = [(host, each) for host, each in rollout.leaving if each.instance == instance]
    if stopping or leaving:
        rollout.attempt.stopped = True
        if not rollout.stays_open:
            rollout.attempt.downtime.begin()
    session = rollout.locked
    stops = [stop(session, session.host(host), state, tell=tell) for host, state in stopping]
    stops += [adopting.stop(session, container) for _, container in leaving]
    clock = asyncio.get_running_loop().time
    begin = clock()
    cut = sum(await all_ended(stops))
    roles = [state.labels.get(generations.ROLE) for _, state in stopping]
    if "proxy" in [*roles, *(container.role for _, container in leaving)]:
        downtime = rollout.attempt.downtime
        downtime.drain = max(downtime.drain, clock() - begin)
    rollout.attempt.cut += cut
    where = ", ".join(sorted({host for host, _ in (*stopping, *leaving)}))
    names = [state.name for _, state in stopping] + [container.name for _, container in leaving]
    detail = ", ".join(f"stopped {name}" for name in names) or "nothing to stop"
    detail = "; ".join(filter(None, (detail, told_of(cut, session))))
    return Report("clean up", instance, where, bool(names), detail)


async def lost_since(rollout: Rollout, *, is_patient: bool = True) -> datetime | None:
    """Look since when the service is lost, by its hosts' clocks: what ran at the survey may have
    ended since, with its engine. None while it serves.

    Args:
        is_patient: whether to ask again where a host does not answer.
    """
    label = {generations.DEPLOYMENT: rollout.session.deployment.name}
    served = {
        state.id
        for states in rollout.containers.values()
        for state in states
        if state.status in generations.RUNNING
    }
    asking = [
        partial(rollout.session.host(host).docker.containers, label) for host in rollout.containers
    ]
    containers = await together(retried(ask) if is_patient else ask() for ask in asking)
    return generations.lost_since(
        state for states in containers for state in states if state.id in served
    )


async def launch(rollout: Rollout, instance: str) -> Report:
    """Create an instance's directories, start script and container; start nothing."""
    where, host = rollout.session.topology.host_of(instance), rollout.session.host_of(instance)
    await rollout.locked.may_change(host)
    plan, ranktables = rollout.plan.instance(instance), rollout.plan.hosts[where].ranktables
    shared = [ranktables.directory] if ranktables else []
    created = await host.make_dirs(plan.directories + shared)
    await rollout.locked.may_change(host)
    written = await _write(host, [plan.start_script])
    if await _find(rollout, instance):
        changes = [f"wrote {path}" for path in (*created, *written)]
        return Report("launch", instance, where, bool(changes), ", ".join(changes) or "present")
    await rollout.locked.may_change(host)
    await host.docker.create(plan.container)
    return Report("launch", instance, where, True, f"created {plan.container.name}")


async def write_ranktables(rollout: Rollout, name: str) -> Report:
    """Write a host's ranktable documents.

    Raises:
        OutOfOrder: the generation was not launched.
    """
    host, plan = rollout.session.host(name), rollout.plan.hosts[name]
    for instance in plan.instances:
        await require(rollout, instance)
    await rollout.locked.may_change(host)
    written = await _write(host, plan.ranktables.files if plan.ranktables else [])
    detail = f"wrote {len(written)} documents" if written else "up to date"
    return Report("ranktable", name, name, bool(written), detail)


async def prepare_proxy(rollout: Rollout, instance: str) -> Report:
    """Start a proxy's container up to the point where it could open its port.

    One that another run has left before that point, or just beyond, starts again: how far it is,
    only its log tells, and there only dates, which clocks that are set make wrong, tell of which
    start.

    Raises:
        OutOfOrder: the generation was not launched.
        InstanceDied: the preparation failed; the message has the proxy's last lines.
    """
    session, where = rollout.session, rollout.session.topology.host_of(instance)
    state = await require(rollout, instance)
    if state.status in generations.RUNNING:
        if state.id in rollout.attempt.log_ends or await _is_open(rollout, instance):
            return Report("prepare proxy", instance, where, False, "runs")
        await stop(rollout.locked, session.host(where), state, ABORT_TIMEOUT_S)
    await _start(rollout, instance, state)
    await _log_says(
        rollout, instance, state, session.engine.PREPARED, session.deployment.gates.prepare_proxy
    )
    return Report("prepare proxy", instance, where, True, "prepared, port closed")


async def start_server(rollout: Rollout, instance: str) -> Report:
    """Start an instance and wait until its launcher runs.

    Raises:
        OutOfOrder: the generation was not launched, or has no ranktables.
        InstanceDied: the launcher ended at once.
    """
    session, where = rollout.session, rollout.session.topology.host_of(instance)
    state = await require(rollout, instance)
    if state.status in generations.RUNNING:
        return Report("start server", instance, where, False, "runs")
    await _require_ranktables(rollout, where)
    await _start(rollout, instance, state)
    await _log_says(
        rollout, instance, state, session.engine.STARTED, session.deployment.gates.start
    )
    return Report("start server", instance, where, True, f"started {state.name}")


async def let_smoke_test_in(rollout: Rollout, name: str) -> str:
    """Open a prepared proxy to the smoke test alone, unless it is open to clients already.

    Returns:
        The address where its port answers on its host.
    """
    session, proxy = rollout.session, rollout.session.topology.proxy(name)
    state = await require(rollout, name)
    runs = state.status in generations.RUNNING
    if runs and await _clients_can_connect(rollout, name):
        return proxy.address
    # Not by its log: one that talks a lot has rotated it.
    if not (runs and await _answers(rollout, name, PROVING_ADDRESS)):
        await prepare_proxy(rollout, name)
        state = await require(rollout, name)
        await _log_says(
            rollout, name, state, session.engine.PREPARED, session.deployment.gates.prepare_proxy
        )
        await _one_step_on(rollout, name, state)
        await _log_says(rollout, name, state, session.engine.OPEN, session.deployment.gates.start)
        # Scripts that older versions of pd-deploy have saved open to clients at once.
        if await _clients_can_connect(rollout, name):
            return proxy.address
    return PROVING_ADDRESS


async def open_proxy(rollout: Rollout, name: str) -> Report:
    """Open a proxy's port to clients; call it once the smoke test has passed."""
    session, proxy = rollout.session, rollout.session.topology.proxy(name)
    where, port, state = proxy.host, proxy.port, await require(rollout, name)
    if await _clients_can_connect(rollout, name):
        if not rollout.attempt.stopped:
            rollout.attempt.downtime.never()
        return Report("open proxy", name, where, False, f"port {port} is open")
    await waiting_room.make_way(rollout, name)
    await _one_step_on(rollout, name, state)
    await _log_says(rollout, name, state, session.engine.OPENED, session.deployment.gates.start)
    rollout.attempt.downtime.end()
    await waiting_room.see_off(rollout, name)
    return Report("open proxy", name, where, True, f"opened port {port}")


async def stop_started(rollout: Rollout) -> dict[str, Exception | None]:
    """Stop, after a failure, what this run has started; keep the containers and their logs.

    Returns:
        By instance, None if it does not run any more, or why it may still run.
    """
    names = sorted(rollout.attempt.started)
    outcomes = await asyncio.gather(
        *(retried(partial(_stop_instance, rollout, name)) for name in names),
        return_exceptions=True,
    )
    faults = {name: _why_it_may_run(outcome) for name, outcome in zip(names, outcomes, strict=True)}
    rollout.attempt.started -= {name for name, fault in faults.items() if fault is None}
    return faults


def _why_it_may_run(outcome: BaseException | None) -> Exception | None:
    if outcome is None or isinstance(outcome, Exception):
        return outcome
    return Abandoned("its stop was cancelled")


async def died(rollout: Rollout, instance: str) -> InstanceDied | HostError:
    """Describe how an instance ended: exit code, the reason if it is known, and the last lines of
    its logs.

    Returns:
        An error of the host if its devices, ports, disk or files tell why, else InstanceDied.
    """
    host, state = rollout.session.host_of(instance), await require(rollout, instance)
    code = await host.docker.wait(state.id)
    state = await host.docker.inspect(state.id)
    lines = await last_lines(rollout, instance)
    if fault := await host_faults.of_instance(rollout, instance):
        return _put_down_to(fault, f"ended with exit code {code}", lines, instance)
    return InstanceDied(
        f"ended with exit code {code}{_cause(state, code)}\n{lines}",
        host=host.where,
        instance=instance,
        hint=f"the whole log is on the host: `docker logs {state.name}` and "
        f"{rollout.plan.instance(instance).log_directory}",
    )


async def not_ready(
    rollout: Rollout, instance: str, message: str, hint: str | None = None
) -> NotReady | HostError:
    """Describe an instance that is not ready in time; an error of its host as in `died`."""
    lines = await last_lines(rollout, instance)
    if fault := await host_faults.of_instance(rollout, instance):
        return _put_down_to(fault, message, lines, instance)
    host = rollout.session.host_of(instance)
    return NotReady(f"{message}\n{lines}", host=host.where, instance=instance, hint=hint)


def _put_down_to(fault: HostError, effect: str, lines: str, instance: str) -> HostError:
    fault.message = f"{effect}; {fault.message}\n{lines}"
    fault.instance = instance
    return fault


async def last_lines(rollout: Rollout, instance: str) -> str:
    """Read the end of an instance's output and log files since its last start, for messages."""
    host, state = rollout.session.host_of(instance), await require(rollout, instance)
    directory = rollout.plan.instance(instance).log_directory
    async with task_group() as group:
        output = group.create_task(
            host.docker.logs(state.id, tail=LOG_LINES, since=state.started_at)
        )
        tails = group.create_task(host.facts.tail([directory], lines=LOG_LINES))
    lines = ["its last lines:", *(f"  | {line}" for line in output.result().splitlines())]
    for path, text in tails.result().items():
        lines += [f"  {path}:", *(f"  | {line}" for line in text.splitlines())]
    return "\n".join(lines)


async def last_line(rollout: Rollout, instance: str) -> str:
    """Read the last line that an instance has written since its last start: to its log file, or
    where it has none, to its output."""
    host, state = rollout.session.host_of(instance), await require(rollout, instance)
    directory = rollout.plan.instance(instance).log_directory
    tails = await host.facts.tail([directory], lines=PROGRESS_LINES)
    if line := end_of("\n".join(tails.values())):
        return line
    return end_of(await host.docker.logs(state.id, tail=PROGRESS_LINES, since=state.started_at))


def end_of(text: str) -> str:
    """Return the last line that is not empty; one that a progress bar wrote anew counts as one."""
    lines = (line.strip() for line in re.split(r"[\r\n]", text))
    return next(filter(None, reversed(list(lines))), "")


async def any_dead(rollout: Rollout, *, within: float = 0) -> InstanceDied | HostError | None:
    """Return the error for an instance, or a proxy, that has ended or does so in `within` s."""
    names = rollout.session.topology.names
    states = await together(require(rollout, name) for name in names)
    ends = {
        asyncio.ensure_future(rollout.session.host_of(name).docker.wait(state.id)): name
        for name, state in zip(names, states, strict=True)
        if within or state.status in generations.ENDED
    }
    if not ends:
        return None
    ended, running = await asyncio.wait(
        ends, timeout=within or None, return_when=asyncio.FIRST_COMPLETED
    )
    for wait in running:
        wait.cancel()
    return await died(rollout, ends[ended.pop()]) if ended else None


async def require(rollout: Rollout, instance: str) -> ContainerState:
    """Return the generation's container of an instance.

    Raises:
        OutOfOrder: it was not launched.
    """
    state = await _find(rollout, instance)
    if state is None:
        raise OutOfOrder(
            f"expected the container {rollout.plan.instance(instance).container.name}, found none",
            host=rollout.session.host_of(instance).where,
            instance=instance,
            hint="run the stage `launch` first",
        )
    return state


def _cause(state: ContainerState, code: int) -> str:
    # Containers have no limit of their own, so it was the host's memory. The engine does not say
    # which process it was: a launcher may well survive its server, and end with code 0.
    if state.oom_killed:
        return ": one of its processes was killed because the host ran out of memory"
    return (
        ", although it should keep running: one of its processes may have failed"
        if code == 0
        else ""
    )


async def _stop_instance(rollout: Rollout, instance: str) -> None:
    state, host = await require(rollout, instance), rollout.session.host_of(instance)
    if state.status in generations.RUNNING:
        await stop(rollout.locked, host, state, ABORT_TIMEOUT_S)


async def _find(rollout: Rollout, instance: str) -> ContainerState | None:
    container = rollout.plan.instance(instance).container
    host, deployment = rollout.session.host_of(instance), rollout.session.deployment.name
    return await host.docker.find(container.name, deployment=deployment)


async def _require_ranktables(rollout: Rollout, name: str) -> None:
    host, ranktables = rollout.session.host(name), rollout.plan.hosts[name].ranktables
    files = ranktables.files if ranktables else []
    contents = await together(host.read_file(file.path) for file in files)
    wrong = [
        file.path
        for file, content in zip(files, contents, strict=True)
        if content != file.content.encode()
    ]
    if wrong:
        raise OutOfOrder(
            f"expected the generation's ranktables, found {', '.join(wrong)} missing or different",
            host=host.where,
            hint="run the stage `ranktable` first",
        )


async def _write(host: Host, files: Iterable[PlannedFile]) -> list[str]:
    return await host.write_files(
        {file.path: File(file.content.encode(), int(file.mode, 8)) for file in files}
    )


async def _start(rollout: Rollout, instance: str, state: ContainerState) -> None:
    host = rollout.session.host_of(instance)
    rollout.attempt.log_ends[state.id] = await host.docker.log_end(state.id)
    await rollout.locked.may_change(host)
    rollout.attempt.started.add(instance)
    rollout.attempt.starts[instance] += 1
    await host.docker.start(state.id)


async def _one_step_on(rollout: Rollout, proxy: str, state: ContainerState) -> None:
    """Take a proxy from prepared to open to the smoke test, and from there to open to clients."""
    session, host = rollout.locked, rollout.session.host_of(proxy)
    if state.id not in rollout.attempt.log_ends:
        rollout.attempt.log_ends[state.id] = await host.docker.log_end(state.id)
    await session.may_change(host)
    await host.docker.kill(state.id, session.engine.OPEN_SIGNAL, deployment=session.deployment.name)


async def _is_open(rollout: Rollout, name: str) -> bool:
    """Tell whether a proxy is open to the smoke test, or to clients."""
    by_clients = await _clients_can_connect(rollout, name)
    return by_clients or await _answers(rollout, name, PROVING_ADDRESS)


async def _clients_can_connect(rollout: Rollout, name: str) -> bool:
    """Tell whether a proxy answers clients; its log may no longer go back to its start."""
    return await _answers(rollout, name, rollout.session.topology.proxy(name).address)


async def _answers(rollout: Rollout, name: str, address: str) -> bool:
    """Tell whether a proxy answers at an address of its host. No answer from there is one only if
    the host was reached all the time: who takes a lost connection for a closed port opens it."""
    proxy, host = rollout.session.topology.proxy(name), rollout.session.host_of(name)
    while True:
        connects = host.connects
        async with host.http(address, proxy.port) as client:
            try:
                url = f"http://{address}:{proxy.port}/health"
                answer = await patiently(partial(client.get, url, timeout=CONNECT_S))
            except httpx.TransportError:
                await host.run(["true"])
                if host.connects == connects:
                    return False
            else:
                return HEADER not in answer.headers


async def _log_says(
    rollout: Rollout, instance: str, state: ContainerState, text: str, timeout: float
) -> None:
    """Wait for a text in what the container has said since this run first touched it."""
    host, after = rollout.session.host_of(instance), rollout.attempt.log_ends[state.id]
    outcome = await host.docker.wait_log(state.id, text, timeout, after=after)
    if outcome == "ended":
        raise await died(rollout, instance)
    if outcome == "timeout":
        message = f"expected {text!r} in its log within {timeout:g} s, did not find it"
        raise await not_ready(rollout, instance, message)
