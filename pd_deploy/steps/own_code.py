"""The user's own source code on hosts: each content of a file once, trees of hard links to them.

A tree is laid out beside the others and then renamed, so that one that is there is whole; nobody
writes to it afterwards. Containers mount it read-only, those of several generations the same one.
"""

import json
import posixpath
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from importlib import resources

from pd_deploy import engines
from pd_deploy.code import reading, tree
from pd_deploy.code.in_container import MARK
from pd_deploy.code.reading import Source
from pd_deploy.code.tree import Entry, Tree
from pd_deploy.config.models import CodeTree
from pd_deploy.engines.base import CodePlace, Layout
from pd_deploy.engines.common import code_setup
from pd_deploy.engines.python import in_python
from pd_deploy.errors import CodeRefused, CommandFailed, NoSuchGeneration
from pd_deploy.hosts.container_values import PullProgress
from pd_deploy.hosts.files import disk_error
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.threads import in_thread
from pd_deploy.steps import throwaway
from pd_deploy.steps.report import Report
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.session import LockedSession, Session

TOLD_BYTES = 1 << 20  # less comes at once
SEND_S = 600.0  # for a batch, over a slow line
ANSWER_S = 300.0  # to read a tree of some GB on a busy disk, and to import a large package
_SOURCE = resources.files("pd_deploy.code").joinpath("in_container.py").read_text()
PROXY_TREE = "/pd-deploy/proxy-code"  # in a container that looks at two trees

# $1 the deployment's trees; names of objects on standard input. Prints the digest and the name of
# those that are there.
LOOK = r"""cd "$1/objects" 2>/dev/null || exit 0
xargs -r sha256sum -- 2>/dev/null; true"""
# $1 as above; a tar of objects on standard input.
RECEIVE = r"""umask 022; mkdir -p "$1/objects" && exec tar -xpmf - -C "$1/objects" """
# $1 as above, $2 a tree's digest; a tar that makes it on standard input.
LAY_OUT = r"""umask 022; cd "$1" && rm -rf new && tar -xpmf - && mv -T new "$2" """
# $1 as above, then the trees that stay; prints those that are removed.
PRUNE = r"""cd "$1" 2>/dev/null || exit 0; shift
for tree in *; do
  case " $* objects " in *" $tree "*) continue;; esac
  [ ! -d "$tree" ] || { printf '%s\n' "$tree"; rm -rf -- "$tree"; }
done
find objects -xdev -type f -links 1 -delete 2>/dev/null; true"""


async def read(session: Session) -> Source:
    """Read the file's source tree, where pd-deploy runs.

    Raises:
        InvalidInput: as `reading.read` says.
    """
    own = session.deployment.own_code
    assert own is not None
    return await in_thread(partial(reading.read, own.source, own.patches), "read source code")


def with_tree(session: Session, source: Source) -> Session:
    """Return the session of the deployment with this source tree."""
    deployment = session.deployment
    place = engines.get(deployment.engine).code_place(deployment)
    of_servers, of_proxy = _trees(source, place)
    code_tree = CodeTree(
        servers=of_servers.digest,
        proxy=of_proxy.digest if of_proxy else None,
        commit=source.commit,
    )
    return session.with_deployment(deployment.model_copy(update={"code_tree": code_tree}))


def _trees(source: Source, place: CodePlace) -> tuple[Tree, Tree | None]:
    """Divide a source tree into what servers see of it, and the proxy: a change of what is the
    proxy's alone leaves the servers as they are."""
    if place.of_proxy is None:
        return source.tree, None
    return source.tree.without(place.of_proxy), source.tree


async def bring(
    rollout: Rollout, name: str, on_progress: Callable[[PullProgress], None] | None = None
) -> Report:
    """Bring the source trees of a generation to a host, and look in a container of its image what
    would run: the digest of each tree, and from where the package is imported.

    Raises:
        NoSuchGeneration: a tree of an older generation is not there any more.
        CodeRefused: something else would run than the tree.
        DiskFull, DiskReadOnly: it can't be written.
    """
    session, host = rollout.locked, rollout.session.host(name)
    places = sorted({mount.source for mount in rollout.code_on(name).values()})
    missing = await host.facts.missing_paths(places)
    async with session.pulling:
        sent = await _send(rollout, host, [*map(posixpath.basename, missing)], on_progress)
    existing = {state.name for state in rollout.states[name].containers}
    if not missing and existing.issuperset(_containers(rollout, name)):
        return Report("bring code", name, name, False, "present")
    said = await _verify(rollout, name)
    return Report("bring code", name, name, bool(missing), f"{sent}; {said}")


def _containers(rollout: Rollout, name: str) -> list[str]:
    return [plan.container.name for plan in rollout.plan.hosts[name].instances.values()]


async def prune(session: LockedSession, host: Host, kept: Collection[str]) -> list[str]:
    """Remove the source trees that no kept generation uses; return which."""
    await session.may_change(host)
    command = ["sh", "-c", PRUNE, "sh", Layout.code_root(session.root), *sorted(kept)]
    return (await host.run(command, timeout=SEND_S)).stdout.split()


async def _send(
    rollout: Rollout,
    host: Host,
    digests: Collection[str],
    on_progress: Callable[[PullProgress], None] | None,
) -> str:
    """Send what a host lacks of some trees, and lay them out; say how much it was."""
    if not digests:
        return "present"
    source, session, root = rollout.source, rollout.locked, Layout.code_root(rollout.session.root)
    place = session.engine.code_place(session.deployment)
    known = {t.digest: t for t in _trees(source, place) if t} if source else {}
    if source is None or not known.keys() >= set(digests):
        raise NoSuchGeneration(
            f"expected the source tree of generation {rollout.plan.generation} below {root}, "
            "found that it was removed",
            host=host.where,
            hint="check the source out as it was then, and run `pd-deploy deploy FILE`",
        )
    trees = [known[digest] for digest in digests]
    wanted = tree.lacking(trees, ())
    lacking = tree.lacking(trees, await _present(host, root, wanted))
    total, done = sum(entry.size for entry in lacking), 0
    for batch in tree.batches(lacking):
        archive = await in_thread(partial(_packed, source, batch), "pack source code")
        await _run(session, host, [RECEIVE, "sh", root], archive)
        done += sum(entry.size for entry in batch)
        if on_progress and total >= TOLD_BYTES:
            on_progress(PullProgress(0, 0, done, total))
    for each in trees:
        await _run(session, host, [LAY_OUT, "sh", root, each.digest], each.archive())
    return f"sent {len(lacking)} of {len(wanted)} files, {tree.size_shown(total)}"


def _packed(source: Source, batch: Iterable[Entry]) -> bytes:
    return tree.objects_archive((entry, source.content(entry)) for entry in batch)


async def _present(host: Host, root: str, wanted: Iterable[Entry]) -> set[str]:
    """Find the objects that are on a host and undamaged."""
    names = "".join(f"{entry.object}\n" for entry in wanted)
    command = ["sh", "-c", LOOK, "sh", root]
    lines = (await host.run(command, input=names, timeout=SEND_S)).stdout.splitlines()
    found = (line.split() for line in lines)
    return {name for digest, name in found if name.removesuffix("x") == digest}


async def _run(session: LockedSession, host: Host, script: list[str], data: bytes) -> None:
    await session.may_change(host)
    try:
        await host.run(["sh", "-c", *script], input=data, timeout=SEND_S)
    except CommandFailed as error:
        raise disk_error(error.stderr, script[2], host.where) or error from None


async def _verify(rollout: Rollout, name: str) -> str:
    """Ask a container of the image, with a generation's trees in it, what would run on a host."""
    session, host = rollout.locked, rollout.session.host(name)
    place = session.engine.code_place(session.deployment)
    by_role = rollout.code_on(name)
    expected = {role: posixpath.basename(mount.source) for role, mount in by_role.items()}
    paths = {role: PROXY_TREE if role == "proxy" else place.mounted_at for role in by_role}
    package = place.package if "servers" in by_role else ""
    setup = code_setup(place, installs=True) if package else ""
    question = json.dumps({"trees": paths, "path": place.path, "package": package})
    output = ""
    try:
        output, _ = await throwaway.output(
            session,
            host,
            rollout.plan.pinned_image,
            in_python(_SOURCE, question, setup=setup),
            ANSWER_S,
            name=throwaway.name_of(session),
            mounts=[
                mount.model_copy(update={"target": paths[role]}) for role, mount in by_role.items()
            ],
        )
        (line,) = (line for line in output.splitlines() if line.startswith(MARK))
        answer = json.loads(line.removeprefix(MARK))
    except (TimeoutError, ValueError):
        last = " / ".join(output.strip().splitlines()[-3:])[-300:]
        raise CodeRefused(
            f"expected a container of {rollout.release.chosen_image} to say which code it has, "
            f"found {repr(last) if last else 'no answer'}",
            host=host.where,
            hint="nothing was stopped",
        ) from None
    return _judged(answer, expected, place, host)


def _judged(
    answer: Mapping[str, object], expected: Mapping[str, str], place: CodePlace, host: Host
) -> str:
    """Say what would run, if it is what was sent.

    Raises:
        CodeRefused: it is not.
    """
    if answer["trees"] != expected:
        raise CodeRefused(
            f"expected the source tree with the digests {expected} in the container, found "
            f"{answer['trees']}",
            host=host.where,
            hint="somebody has changed it on the host; nothing was stopped. Change a file of the "
            "tree, or remove the tree on the host, and deploy again",
        )
    if "package" not in answer:
        return "as it was read"
    where, fault, missing = (str(answer[key]) for key in ("package", "fault", "missing"))
    if fault:
        raise CodeRefused(
            f"expected {place.package} to be imported from {place.path}, found {fault}",
            host=host.where,
            hint="nothing was stopped; correct the tree, or take the one of the image's commit",
        )
    if not where.startswith(f"{place.path}/"):
        found = f"that the image imports it from {where}" if where else "no such package there"
        raise CodeRefused(
            f"expected {place.package} to be imported from {place.path}, where the tree is; found "
            f"{found}",
            host=host.where,
            hint="nothing was stopped; set `code.path` to the place that the image imports, with "
            "the part of the tree that belongs there as `code.source`, or name another "
            "`code.package`",
        )
    untried = f" (not tried further without devices: {missing})" if missing else ""
    return f"{place.package} is imported from {where}{untried}"
