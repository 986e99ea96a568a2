"""What every host does, whether it is reached by SSH or stands in memory.

`tests/lab/test_host_contract.py` runs these tests on the lab, `tests/unit/test_host_contract.py` on
a host in memory: so flows in memory meet what they would meet on a real host. A test here uses a
`host`, an `image` that it has, and somebody at its `console`.
"""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest

from pd_deploy import errors
from pd_deploy.code import tree
from pd_deploy.hosts import facts
from pd_deploy.hosts.container_values import (
    DEPLOYMENT_LABEL,
    Adopted,
    ContainerSpec,
    Mount,
    PullProgress,
)
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import PART_BYTES, Host
from pd_deploy.hosts.lease import Lease, Owner, this_process
from pd_deploy.registry import archives
from pd_deploy.steps import host_records, own_code
from tests.archives import Image, tar

# What the two modules of tests take from here.
__all__ = [
    "TestCommands",
    "TestConnections",
    "TestContainers",
    "TestDisks",
    "TestFacts",
    "TestFiles",
    "TestImages",
    "TestLeases",
    "TestSourceTrees",
    "create",
    "place",
]

OURS = "host-contract"
PLACE = "/var/lib/pd-host-contract"
PORT = 4243
Create = Callable[..., Awaitable[str]]


class Console(Protocol):
    """What somebody does and sees at a host's console."""

    interface: str

    def modes(self, directory: str) -> dict[str, str]:
        """The names in a directory, hidden ones too, each with its mode in octal."""

    def date(self, path: str, seconds: int) -> None:
        """Set the host's clock, as a file that was just written sees it: it looks so old then."""

    def small_disk(self, directory: str) -> AbstractContextManager[object]:
        """Mount a file system of 128 KiB at a directory meanwhile."""

    def fill(self, directory: str) -> None:
        """Leave no room on it."""

    def make_read_only(self, directory: str) -> None:
        """Mount it again, read-only."""

    def unplugged(self) -> AbstractContextManager[object]:
        """Pull the host's network cable meanwhile."""

    def listening(self, port: int) -> AbstractContextManager[object]:
        """Have a process listen on a port meanwhile."""

    def run_container(self, name: str) -> None:
        """Run a container that is no deployment's."""

    def remove_container(self, name: str) -> None:
        """Remove it."""

    def push(self, tag: str) -> str:
        """Push a new image to the repository of `image`; its digest."""


@pytest.fixture
async def place(host: Host) -> AsyncIterator[str]:
    """A directory that is not there yet."""
    yield PLACE
    await host.remove_tree(PLACE, below="/var/lib")


@pytest.fixture
async def create(host: Host, image: str) -> AsyncIterator[Create]:
    """Creates labelled containers that are removed after the test."""

    async def make(*command: str, **more: object) -> str:
        spec = ContainerSpec(
            name=f"{OURS}-{uuid4().hex[:8]}",
            image=image,
            command=command or ("sleep", "600"),
            labels={DEPLOYMENT_LABEL: OURS},
            stop_timeout=1,
        )
        return await host.docker.create(spec.model_copy(update=more))

    yield make
    for state in await host.docker.containers({DEPLOYMENT_LABEL: OURS}):
        await host.docker.remove(state.id, deployment=OURS, force=True)


class TestCommands:
    async def test_input_comes_out_of_cat(self, host: Host) -> None:
        done = await host.run(["cat"], input="a secret\n")
        assert (done.exit_status, done.stdout, done.stderr) == (0, "a secret\n", "")
        assert await host.output(["cat"]) == ""

    async def test_failure_is_an_error_unless_allowed(self, host: Host) -> None:
        assert (await host.run(["false"], check=False)).exit_status == 1
        with pytest.raises(errors.CommandFailed, match="`false` exited with 1") as caught:
            await host.run(["false"])
        assert (caught.value.exit_status, caught.value.argv) == (1, ["false"])
        assert caught.value.host == host.where

    async def test_missing_command_is_status_127_and_named(self, host: Host) -> None:
        done = await host.run(["no-such-command"], check=False)
        assert done.exit_status == 127
        assert "no-such-command" in done.stderr
        assert "No such file" in done.stderr

    async def test_several_in_one_session_each_with_its_output(self, host: Host) -> None:
        assert await host.outputs(["true"], ["sh", "-c", facts.MISSING, "sh", "/no\n!"]) == [
            "",
            "/no\n!\0",
        ]
        assert await host.outputs() == []

    async def test_of_several_none_runs_after_one_that_failed(self, host: Host) -> None:
        failing = [["true"], ["no-such-command", "x"], ["sleep", "600"]]
        with pytest.raises(errors.CommandFailed, match="`no-such-command x` exited") as caught:
            await host.outputs(*failing)
        assert (caught.value.exit_status, caught.value.argv) == (127, failing[1])
        assert "no-such-command" in caught.value.stderr

    async def test_slow_command_times_out(self, host: Host) -> None:
        with pytest.raises(errors.TimedOut, match=r"`sleep 600` did not end within 0\.2 s"):
            await host.run(["sleep", "600"], timeout=0.2)


class TestConnections:
    async def test_an_unplugged_host(self, host: Host, create: Create, console: Console) -> None:
        """A call under way is lost; the next one finds no host; then all goes on as before."""
        id = await create("sh", "-c", "trap '' TERM; echo deaf; sleep 600")
        await host.docker.start(id)
        assert await host.docker.wait_log(id, "deaf", 30) == "seen"
        before = host.connects
        stop = asyncio.ensure_future(host.docker.stop(id, deployment=OURS, timeout=600))
        await host.run(["cat"], input="under way, or nearly so")
        with console.unplugged():
            with pytest.raises(errors.TransientError):
                await stop
            with pytest.raises(errors.HostUnreachable):
                await host.run(["cat"])
            with pytest.raises(errors.HostUnreachable):
                await host.read_file("/etc/hostname")
        assert (await host.docker.inspect(id)).running
        assert host.connects == before + 1


class TestFiles:
    async def test_only_what_differs_is_written(
        self, host: Host, console: Console, place: str
    ) -> None:
        one, two = f"{place}/x/one", f"{place}/y/two"
        files = {one: File(b"1"), two: File(b"2", 0o600)}
        assert await host.write_files(files, dir_mode=0o750) == [one, two]
        assert await host.write_files(files) == []
        assert await host.write_files({**files, two: File(b"3", 0o600)}) == [two]
        assert await host.write_files({**files, two: File(b"3", 0o640)}) == [two]
        assert await host.read_file(two) == b"3"
        assert console.modes(place) == {"x": "750", "y": "750"}
        assert console.modes(f"{place}/x") == {"one": "644"}
        # Nothing is left of the drafts.
        assert console.modes(f"{place}/y") == {"two": "640"}

    async def test_readers_see_old_or_new(self, host: Host, place: str) -> None:
        path, sizes = f"{place}/file", {100_000, 300_000}
        await host.write_files({path: File(b"a" * 100_000)})
        writing = asyncio.ensure_future(host.write_files({path: File(b"b" * 300_000)}))
        while not writing.done():
            content = await host.read_file(path)
            assert content is not None
            assert len(content) in sizes
            assert len(set(content)) == 1
        assert await writing == [path]

    @pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1])
    async def test_a_large_file_comes_in_parts(self, host: Host, place: str, size: int) -> None:
        content = (b"0123456789" * (size // 10 + 1))[:size]
        await host.write_files({f"{place}/file": File(content)})
        parts = [part async for part in host.read_in_parts(f"{place}/file")]
        assert b"".join(parts) == content
        assert all(len(part) <= PART_BYTES for part in parts)
        with pytest.raises(errors.FileMissing):
            await anext(host.read_in_parts(f"{place}/none"))

    async def test_missing_things_are_none(self, host: Host, place: str) -> None:
        assert await host.read_file(f"{place}/no") is None
        assert not await host.remove_tree(f"{place}/no", below=place)
        assert await host.find_files(place) == []

    async def test_directories(self, host: Host, console: Console, place: str) -> None:
        made = await host.make_dirs([f"{place}/p/q"], 0o700)
        assert made == [place, f"{place}/p", f"{place}/p/q"]
        assert await host.make_dirs([f"{place}/p/q"]) == []
        assert console.modes(f"{place}/p") == {"q": "700"}

    async def test_what_is_there_in_another_kind_is_refused(self, host: Host, place: str) -> None:
        await host.write_files({f"{place}/d/file": File(b"x")})
        with pytest.raises(errors.FileDenied, match=f"a file at {place}/d, found a directory"):
            await host.write_files({f"{place}/d": File(b"")})
        with pytest.raises(errors.FileDenied, match=r"a directory at .*, found a file"):
            await host.make_dirs([f"{place}/d/file"])
        with pytest.raises(errors.FileDenied, match=r"a directory at .*, found a file"):
            await host.write_files({f"{place}/d/file/below": File(b"")})
        with pytest.raises(errors.HostError):
            await host.read_file(place)
        assert await host.read_file(f"{place}/d/file") == b"x"

    async def test_files_are_found_at_any_depth(self, host: Host, place: str) -> None:
        paths = [f"{place}/a", f"{place}/b/c/d", f"{place}/b/.hidden"]
        await host.write_files({path: File(b"") for path in paths})
        assert await host.find_files(place) == sorted(paths)

    async def test_a_tree_is_removed_with_all_in_it(
        self, host: Host, console: Console, place: str
    ) -> None:
        await host.write_files({f"{place}/{n}": File(b"") for n in ("a/b/c", "a/d", "ab/e", "f")})
        assert await host.remove_tree(f"{place}/a", below=place)
        assert await host.remove_tree(f"{place}/f", below=place)
        assert not await host.remove_tree(f"{place}/f", below=place)
        assert list(console.modes(place)) == ["ab"]

    @pytest.mark.parametrize("path", [PLACE, "/var/lib", "/", f"{PLACE}/../x", "x", ""])
    async def test_removes_nothing_outside(self, host: Host, place: str, path: str) -> None:
        await host.make_dirs([place])
        with pytest.raises(errors.NotOurs):
            await host.remove_tree(path, below=place)
        assert await host.make_dirs([place]) == []

    async def test_sizes_of_files(self, host: Host, place: str) -> None:
        assert await host.facts.sizes(place) == {}
        await host.write_files({f"{place}/x": File(b"abc"), f"{place}/in/y": File(b"")})
        assert await host.facts.sizes(place) == {f"{place}/x": 3, f"{place}/in/y": 0}
        parts = [part async for part in host.read_in_parts(f"{place}/x", 1)]
        assert b"".join(parts) == b"bc"

    async def test_tail(self, host: Host, place: str) -> None:
        """Of files, and of those directly in a directory."""
        log = "".join(f"line {n}\n" for n in range(1000)).encode()
        await host.write_files(
            {
                f"{place}/l/a.log": File(log),
                f"{place}/l/deeper/b.log": File(log),
                f"{place}/b.log": File(b"x" * 9000),
            }
        )
        asked = [f"{place}/l", f"{place}/b.log", f"{place}/no"]
        assert await host.facts.tail(asked, lines=2, max_bytes=100) == {
            f"{place}/l/a.log": "line 998\nline 999\n",
            f"{place}/b.log": "x" * 100,
        }

    async def test_tree_has_modes_and_digests_and_of_logs_only_directories(
        self, host: Host, place: str
    ) -> None:
        root, logs = f"{place}/root", f"{place}/logs"
        command = facts.tree(root, logs)
        assert facts.parse_tree(await host.output(command)) == {}
        await host.make_dirs([f"{root}/1-a/p0", f"{logs}/1-a/p0/deeper"])
        await host.write_files(
            {
                f"{root}/.record.json.0.tmp": File(b"{", 0o600),
                f"{root}/1-a/p0/start.sh": File(b"exit 3\n", 0o700),
                f"{root}/1-a/p0/a name": File(b"", 0o644),
                f"{logs}/1-a/p0/x.log": File(b"log"),
            }
        )
        tree = facts.parse_tree(await host.output(command))
        files = {path: (s.mode, s.sha256) for path, s in tree.items() if not s.is_directory}
        assert files == {
            f"{root}/.record.json.0.tmp": (0o600, ""),
            f"{root}/1-a/p0/start.sh": (0o700, sha256(b"exit 3\n").hexdigest()),
            f"{root}/1-a/p0/a name": (0o644, sha256(b"").hexdigest()),
        }
        assert {path for path, s in tree.items() if s.is_directory} == {
            root, f"{root}/1-a", f"{root}/1-a/p0", logs, f"{logs}/1-a", f"{logs}/1-a/p0",
        }  # fmt: skip


class TestSourceTrees:
    """Of the user's own code."""

    async def test_a_content_is_kept_once_and_damage_is_seen(
        self, host: Host, console: Console, place: str
    ) -> None:
        root, names = f"{place}/.code", await laid_out(host, place)
        assert console.modes(root) == {DIGEST: "755", tree.OBJECTS: "755"}
        paths = [f"{root}/{DIGEST}/{name}" for name in ("a\nb", "sub/run.sh")]
        assert await host.find_files(f"{root}/{DIGEST}") == paths
        file, program = names
        objects = f"{root}/{tree.OBJECTS}"
        assert console.modes(objects) == {file: "644", program: "755"}
        assert console.modes(f"{root}/{DIGEST}/sub") == {"run.sh": "755"}
        look = ["sh", "-c", own_code.LOOK, "sh", root]
        wanted = "\n".join([*names, "0" * 64])
        seen = (await host.run(look, input=wanted)).stdout.split()
        assert dict(zip(seen[1::2], seen[::2], strict=True)) == dict.fromkeys(names, file)
        await host.write_files({f"{objects}/{file}": File(b"damaged")})
        seen = (await host.run(look, input=file)).stdout.split()
        assert seen == [sha256(b"damaged").hexdigest(), file]
        # A tree is no generation, and what is in it is not looked through.
        found = facts.parse_tree(await host.output(facts.tree(place, f"{place}/logs")))
        assert [path for path in found if root in path] == [
            root, *sorted([f"{root}/{DIGEST}", f"{root}/{tree.OBJECTS}"])
        ]  # fmt: skip
        assert (
            host_records.parse(
                await host.output(host_records.command(place)), host, place
            ).generations
            == frozenset()
        )

    async def test_objects_go_with_the_last_tree_that_has_them(
        self, host: Host, console: Console, place: str
    ) -> None:
        root, _ = f"{place}/.code", await laid_out(host, place)
        prune = ["sh", "-c", own_code.PRUNE, "sh", root]
        assert (await host.run([*prune, DIGEST])).stdout == ""
        assert len(console.modes(f"{root}/{tree.OBJECTS}")) == 2
        assert (await host.run(prune)).stdout == f"{DIGEST}\n"
        assert console.modes(root) == {tree.OBJECTS: "755"}
        assert console.modes(f"{root}/{tree.OBJECTS}") == {}
        assert (await host.run(["sh", "-c", own_code.PRUNE, "sh", f"{place}/none"])).stdout == ""


DIGEST = "d" * 64


async def laid_out(host: Host, place: str) -> list[str]:
    """Send the objects of a tree, and lay it out; return their names."""
    root, content = f"{place}/.code", b"echo"
    sha256_of = sha256(content).hexdigest()
    entries = (
        tree.Entry("a\nb", "file", sha256_of, len(content)),
        tree.Entry("link", "link", "0" * 64, 0, "sub/run.sh"),
        tree.Entry("sub/run.sh", "program", sha256_of, len(content)),
    )
    made = tree.Tree(entries)
    objects = tree.objects_archive((entry, content) for entry in made.objects.values())
    await host.run(["sh", "-c", own_code.RECEIVE, "sh", root], input=objects)
    await host.run(["sh", "-c", own_code.LAY_OUT, "sh", root, DIGEST], input=made.archive())
    return sorted(made.objects)


class TestFacts:
    async def test_facts(self, host: Host, console: Console) -> None:
        read = host.facts
        addresses = await host.output(facts.ADDRESSES)
        assert facts.parse_interface(addresses, host.address) == console.interface
        assert facts.parse_interface(addresses, "127.0.0.1") is None
        assert facts.parse_loopback(addresses, "127.0.0.1") == "lo"
        assert facts.parse_interface(addresses, "192.0.2.1") is None
        assert facts.parse_route(await host.output(facts.ROUTE)) in {host.address, None}
        assert await read.missing_paths(["/var", "/no such", "/no"]) == ["/no such", "/no"]
        assert await read.missing_paths([]) == []
        assert min(await read.disk_free("/var/not/yet/there", "/var")) > 0

    async def test_ports_and_who_holds_them(self, host: Host, console: Console) -> None:
        assert await host.facts.ports_taken([PORT]) == {}
        with console.listening(PORT):
            taken = await host.facts.ports_taken([PORT, PORT + 1])
            (pid,) = map(int, re.findall(r"\(pid (\d+)\)", taken[PORT]))
            assert list(await host.facts.containers_of([pid, 1 << 30])) == [pid]
            assert list(taken) == [PORT]
            assert "(pid " in taken[PORT]
        assert await host.facts.ports_taken([PORT]) == {}


class TestImages:
    async def test_pull_and_resolve_give_the_registrys_digest(
        self, host: Host, image: str, console: Console
    ) -> None:
        tag, repository = f"t{uuid4().hex[:8]}", image.rpartition(":")[0]
        digest = console.push(tag)
        assert await host.docker.resolve(f"{repository}:{tag}") == digest
        assert await host.docker.image(f"{repository}:{tag}") is None
        reference = f"{repository}@{digest}"
        pulled = await host.docker.pull(reference)
        assert pulled.digest == reference
        there = await host.docker.image(reference)
        assert there is not None
        assert (there.id, there.digest, there.tags) == (pulled.id, reference, ())
        assert (await host.docker.pull(f"{repository}:{tag}")).digest == reference
        there = await host.docker.image(reference)
        assert there is not None
        assert there.tags == (f"{repository}:{tag}",)
        # A tag takes the digests of its repository along.
        await host.docker.remove_image(f"{repository}:{tag}")
        assert await host.docker.image(reference) is None

    @pytest.mark.parametrize("tagged", [True, False], ids=["with a name", "without one"])
    async def test_an_archive_is_loaded(
        self, host: Host, image: str, tagged: bool, tmp_path: Path
    ) -> None:
        """It has its id, no digest, and goes by that id; a layout is what builders write."""
        there, name = await host.docker.image(image), f"pd-{OURS}:{uuid4().hex[:8]}"
        assert there
        made = Image(uuid4().hex, there.architecture)
        file = tmp_path / "image.tar.gz"
        await asyncio.to_thread(
            file.write_bytes, gzip.compress(made.saved(name) if tagged else made.laid_out())
        )
        read = await archives.read(str(file))
        told: list[PullProgress] = []
        loaded = await host.docker.load(read.id, read.parts, read.size, told.append)
        assert (loaded.id, loaded.digest, loaded.architecture) == (
            made.id,
            None,
            there.architecture,
        )
        assert loaded.tags == ((name,) if tagged else ())
        await host.docker.load(read.id, read.parts, read.size)
        await host.docker.remove_image(made.id)
        assert await host.docker.image(made.id) is None
        assert {progress.bytes_total for progress in told} == {read.size}

    async def test_an_archive_that_is_none_or_of_another_image(self, host: Host) -> None:
        made = Image("other")
        with pytest.raises(errors.ImageNotFound, match="found none with that id"):
            await host.docker.load(f"sha256:{0:064}", lambda: [made.saved()], 0)
        await host.docker.remove_image(made.id)
        with pytest.raises(errors.DockerRefused, match=r"load .*no such file or directory"):
            await host.docker.load(made.id, lambda: [tar({"x": b""})], 0)

    async def test_an_image_goes_with_its_last_name(
        self, host: Host, image: str, console: Console, create: Create
    ) -> None:
        digest = console.push(f"t{uuid4().hex[:8]}")
        reference, ours = f"{image.rpartition(':')[0]}@{digest}", f"pd-deploy/{OURS}:1"
        pulled = await host.docker.pull(reference)
        await host.docker.tag(reference, ours)
        container = await create(image=reference)
        tagged = await host.docker.image(ours)
        assert tagged is not None
        assert (tagged.id, tagged.digest, tagged.tags) == (pulled.id, None, (ours,))
        await host.docker.remove_image(ours)
        assert await host.docker.image(ours) is None
        # A container uses it: its last name stays, without an error.
        await host.docker.remove_image(reference)
        assert await host.docker.image(reference) is not None
        await host.docker.remove(container, deployment=OURS)
        await host.docker.remove_image(reference)
        assert await host.docker.image(reference) is None
        assert await host.docker.image(pulled.id) is None
        await host.docker.remove_image(reference)

    async def test_a_name_moves_to_another_image(
        self, host: Host, image: str, console: Console
    ) -> None:
        repository, ours = image.rpartition(":")[0], f"pd-deploy/{OURS}:2"
        pulled = [await host.docker.pull(f"{repository}@{console.push(t)}") for t in ("m1", "m2")]
        for one in pulled:
            assert one.digest
            await host.docker.tag(one.digest, ours)
            named = await host.docker.image(ours)
            assert named is not None
            assert named.id == one.id
        for name in (ours, *(one.digest for one in pulled)):
            await host.docker.remove_image(str(name))

    async def test_absent_image(self, host: Host, image: str) -> None:
        absent = f"{image.rpartition(':')[0]}:no-such-tag"
        assert await host.docker.image(absent) is None
        with pytest.raises(errors.ImageNotFound, match="no-such-tag"):
            await host.docker.pull(absent)
        with pytest.raises(errors.ImageNotFound, match="no-such-tag"):
            await host.docker.resolve(absent)
        with pytest.raises(errors.ImageNotFound, match="pull the image first"):
            await host.docker.create(ContainerSpec(name="x", image=absent))
        with pytest.raises(errors.PdDeployError):
            await host.docker.tag(absent, f"pd-deploy/{OURS}:3")

    async def test_registry_down(self, host: Host) -> None:
        with pytest.raises(errors.RegistryUnavailable):
            await host.docker.pull("127.0.0.1:5998/some/image:1")
        with pytest.raises(errors.RegistryUnavailable):
            await host.docker.resolve("127.0.0.1:5998/some/image:1")


class TestContainers:
    async def test_life(self, host: Host, image: str, create: Create) -> None:
        docker = host.docker
        more = {DEPLOYMENT_LABEL: OURS, "pd-deploy.x": "1"}
        id = await create("sh", "-c", "echo out; sleep 600", labels=more, name=f"{OURS}-life")
        made = await docker.inspect(f"{OURS}-life")
        assert (made.id, made.name, made.image) == (id, f"{OURS}-life", image)
        assert (made.status, made.exit_code, made.started_at, made.finished_at) == (
            "created",
            None,
            None,
            None,
        )
        assert more.items() <= made.labels.items()
        await docker.start(id)
        await docker.start(id)
        runs = await docker.inspect(id)
        assert (runs.running, runs.exit_code, runs.finished_at) == (True, None, None)
        assert await docker.wait_log(id, "out", 30) == "seen"
        await docker.stop(id, deployment=OURS, timeout=5)
        await docker.stop(id, deployment=OURS, timeout=5)
        ended = await docker.inspect(id)
        assert (ended.status, ended.exit_code) == ("exited", 143)
        assert (ended.oom_killed, ended.error) == (False, "")
        assert ended.started_at is not None
        assert ended.finished_at is not None
        assert ended.finished_at > ended.started_at
        await docker.start(id)
        again = await docker.inspect(id)
        # When it last ended still stands there: what it says from then on is of this run.
        assert (again.running, again.exit_code) == (True, None)
        assert again.finished_at == ended.finished_at
        assert again.started_at is not None
        assert again.started_at > ended.finished_at

    async def test_signals(self, host: Host, create: Create) -> None:
        docker = host.docker
        ends, ignores = await asyncio.gather(
            create(), create("sh", "-c", "trap '' TERM; echo deaf; sleep 600")
        )
        for id in (ends, ignores):
            with pytest.raises(errors.DockerRefused, match="is not running"):
                await docker.kill(id, "SIGTERM", deployment=OURS)
            await docker.start(id)
        await docker.kill(ends, "SIGTERM", deployment=OURS)
        assert await docker.wait(ends) == 143
        assert await docker.wait_log(ignores, "deaf", 30) == "seen"
        await docker.kill(ignores, "SIGTERM", deployment=OURS)
        assert (await docker.inspect(ignores)).running
        # Killed when the stop's time is up.
        await docker.stop(ignores, deployment=OURS, timeout=1)
        assert (await docker.inspect(ignores)).exit_code == 137
        await docker.start(ends)
        await docker.kill(ends, deployment=OURS)
        assert await docker.wait(ends) == 137

    async def test_wait_gives_the_exit_code(self, host: Host, create: Create) -> None:
        id = await create("sh", "-c", "sleep 0.5; exit 7")
        waiting = asyncio.ensure_future(host.docker.wait(id))
        await host.docker.start(id)
        assert await waiting == 7
        assert await host.docker.wait(id) == 7
        with pytest.raises(errors.ContainerMissing):
            await host.docker.wait("no-such-container")

    async def test_removal(self, host: Host, create: Create) -> None:
        docker = host.docker
        id = await create()
        await docker.start(id)
        with pytest.raises(errors.DockerRefused, match="running"):
            await docker.remove(id, deployment=OURS)
        assert await docker.remove(id, deployment=OURS, force=True)
        assert not await docker.remove(id, deployment=OURS)
        for call in (
            docker.start(id),
            docker.inspect(id),
            docker.logs(id),
            docker.copy_log(id, print),
            docker.stop(id, deployment=OURS),
            docker.kill(id, deployment=OURS),
        ):
            with pytest.raises(errors.ContainerMissing):
                await call

    async def test_found_by_labels(self, host: Host, create: Create) -> None:
        docker, mine = host.docker, {DEPLOYMENT_LABEL: OURS}
        b = await create(name=f"{OURS}-b", labels={**mine, "pd-deploy.x": "1"})
        a = await create(name=f"{OURS}-a", labels={**mine, "pd-deploy.x": "10"})
        await docker.start(a)

        async def ids(**more: str) -> list[str]:
            wanted = {**mine, **{f"pd-deploy.{key}": value for key, value in more.items()}}
            return [state.id for state in await docker.containers(wanted)]

        assert await ids() == [a, b]
        assert await ids(x="") == [a, b]
        assert await ids(x="1") == [b]
        assert await ids(x="1*") == []
        assert await ids(y="") == []

    async def test_output(self, host: Host, create: Create) -> None:
        docker = host.docker
        id = await create("sh", "-c", "echo run; echo last; sleep 600")
        await docker.start(id)
        assert await docker.wait_log(id, "last", 30) == "seen"
        assert await docker.logs(id, 1) == "last\n"
        await docker.stop(id, deployment=OURS, timeout=5)
        since, end = (await docker.inspect(id)).finished_at, await docker.log_end(id)
        assert end.endswith(" last")
        assert await docker.logs(id, "all", since=since) == ""
        assert await docker.wait_log(id, "run", 30) == "seen"
        assert await docker.wait_log(id, "last", 30, after=end) == "ended"
        await docker.start(id)
        assert await docker.wait_log(id, "last", 30, after=end) == "seen"
        assert await docker.logs(id, "all", since=since) == "run\nlast\n"
        assert await docker.logs(id, "all") == "run\nlast\nrun\nlast\n"
        parts: list[bytes] = []
        await docker.copy_log(id, parts.append)  # ends, although the container runs
        assert b"".join(parts) == b"run\nlast\nrun\nlast\n"

    async def test_a_command_in_a_container(self, host: Host, create: Create) -> None:
        """Its outputs come apart, and its exit code is told; none runs where none may."""
        docker, out, err = host.docker, list[bytes](), list[bytes]()

        def write(printed: bytes, complained: bytes) -> None:
            out.append(printed)
            err.append(complained)

        id = await create()
        command = ["sh", "-c", "echo here; echo there >&2; exit 3"]
        with pytest.raises(errors.DockerRefused, match="is not running"):
            await docker.execute(id, command, write, deployment=OURS)
        await docker.start(id)
        assert await docker.execute(id, command, write, deployment=OURS) == 3
        assert (b"".join(out), b"".join(err)) == (b"here\n", b"there\n")
        with pytest.raises(errors.NotOurs):
            await docker.execute(id, command, write, deployment="other")
        absent = await docker.execute(id, ["no-such-program"], write, deployment=OURS)
        assert absent in (126, 127)
        with pytest.raises(errors.ContainerMissing):
            await docker.execute("no-such", command, write, deployment=OURS)
        assert await docker.execute(id, command, write, deployment=OURS, attended=True) == 3

    async def test_a_container_of_somebody_else_that_was_adopted(
        self, host: Host, create: Create
    ) -> None:
        """It is touched under its id and name together, and only without our label."""
        docker = host.docker
        id, ours = await create(labels={}), await create()
        adopted = Adopted(id, (await docker.inspect(id)).name)
        await docker.start(id)
        for owner in (OURS, Adopted(id, "another"), Adopted(ours, adopted.name)):
            with pytest.raises(errors.NotOurs):
                await docker.stop(id, deployment=owner)
        with pytest.raises(errors.NotOurs):
            await docker.remove(ours, deployment=Adopted(ours, (await docker.inspect(ours)).name))
        await docker.spawn(
            id, ["sh", "-c", "exit 0"], deployment=adopted, environment={"A": "b"}, directory="/"
        )
        await docker.stop(id, deployment=adopted, timeout=0)
        assert await docker.remove(id, deployment=adopted)

    async def test_output_that_comes(self, host: Host, create: Create) -> None:
        docker = host.docker
        id = await create("sh", "-c", "echo one; echo two; echo three; exit 0")
        await docker.start(id)
        await docker.wait(id)
        lines = await docker.output_after(id, "", 2)
        assert [line.partition(" ")[2] for line in lines] == ["two", "three"]
        assert await docker.output_after(id, lines[-1], 2) == []
        await docker.start(id)
        await docker.wait(id)
        after = await docker.output_after(id, lines[-1], 2)
        assert [line.partition(" ")[2] for line in after] == ["one", "two", "three"]

    async def test_output_after_a_place_in_a_long_log(self, host: Host, create: Create) -> None:
        """A place that was rotated away leaves all that there is."""
        docker = host.docker
        said = "; ".join(f"echo {number}" for number in range(300))
        id = await create("sh", "-c", f"echo first; {said}; echo last; exit 0")
        assert await docker.log_end(id) == ""
        await docker.start(id)
        await docker.wait(id)
        assert await docker.wait_log(id, "first", 30, after="") == "seen"
        end = await docker.log_end(id)
        await docker.start(id)
        await docker.wait(id)
        for text in ("first", "42", "last"):
            assert await docker.wait_log(id, text, 30, after=end) == "seen"
            assert await docker.wait_log(id, text, 30, after="1999-12-31 none") == "seen"
        end = await docker.log_end(id)
        assert await docker.wait_log(id, "last", 30, after=end) == "ended"

    async def test_wait_log_ends_with_the_container_or_in_time(
        self, host: Host, create: Create
    ) -> None:
        short, long = await create("echo", "x"), await create()
        await asyncio.gather(host.docker.start(short), host.docker.start(long))
        assert await host.docker.wait_log(short, "never", 30) == "ended"
        assert await host.docker.wait_log(long, "never", 0.3) == "timeout"

    async def test_others_are_not_touched(self, host: Host, image: str, console: Console) -> None:
        console.run_container("theirs")
        try:
            for call in (
                host.docker.stop("theirs", deployment=OURS),
                host.docker.kill("theirs", deployment=OURS),
                host.docker.remove("theirs", deployment=OURS, force=True),
            ):
                with pytest.raises(errors.NotOurs, match="theirs"):
                    await call
            assert (await host.docker.inspect("theirs")).running
            assert await host.docker.containers({DEPLOYMENT_LABEL: OURS}) == []
        finally:
            console.remove_container("theirs")

    async def test_name_taken(self, host: Host, create: Create) -> None:
        await create(name=f"{OURS}-twice")
        with pytest.raises(errors.NameTaken, match=f"{OURS}-twice"):
            await create(name=f"{OURS}-twice")

    async def test_missing_mount_source(self, host: Host, create: Create) -> None:
        mounts = (Mount(source="/no/such/model", target="/model"),)
        with pytest.raises(errors.FileMissing) as caught:
            await create("true", mounts=mounts)
        assert caught.value.path == "/no/such/model"
        assert await host.facts.missing_paths(["/no/such/model"])
        assert await host.docker.containers({DEPLOYMENT_LABEL: OURS}) == []

    async def test_mount_source_that_went_after_creation(self, host: Host, create: Create) -> None:
        source = f"{PLACE}/went"
        await host.make_dirs([source])
        id = await create("true", mounts=(Mount(source=source, target="/model"),))
        await host.remove_tree(source, below=PLACE)
        with pytest.raises(errors.FileMissing) as caught:
            await host.docker.start(id)
        assert caught.value.path == source

    async def test_a_name_of_ours_is_looked_up_by_label(
        self, host: Host, create: Create, console: Console
    ) -> None:
        id = await create(name=f"{OURS}-named")
        state = await host.docker.find(f"{OURS}-named", deployment=OURS)
        assert state is not None
        assert state.id == id
        assert await host.docker.find(f"{OURS}-nobody", deployment=OURS) is None
        console.run_container("theirs")
        try:
            with pytest.raises(errors.NameTaken, match="theirs"):
                await host.docker.find("theirs", deployment=OURS)
            everyone = {one.name: one for one in await host.docker.listed()}
            assert everyone[f"{OURS}-named"].id == id
            assert everyone[f"{OURS}-named"].labels[DEPLOYMENT_LABEL] == OURS
            assert everyone[f"{OURS}-named"].status == "created"
            assert everyone["theirs"].status == "running"
        finally:
            console.remove_container("theirs")

    async def test_missing_device(self, host: Host, create: Create) -> None:
        id = await create("true", devices=("/dev/davinci99",))
        with pytest.raises(errors.FileMissing) as caught:
            await host.docker.start(id)
        assert caught.value.path == "/dev/davinci99"
        state = await host.docker.inspect(id)
        assert (state.status, state.exit_code, state.started_at) == ("created", None, None)
        assert "/dev/davinci99" in state.error


LEASED = f"{PLACE}/leased"


def lease(run: str, *, root: str = LEASED, lasts: float = 30, **owner: Any) -> Lease:
    """A lease of a run, of which nothing tells that it is dead unless said otherwise."""
    elsewhere = {"machine": "elsewhere boot pid", "pid": 1, "started": "1"}
    return Lease(root, Owner(deployment="leased", run=run, **{**elsewhere, **owner}), lasts)


async def take(one: Lease, host: Host, wait: float = 0) -> None:
    await one.take([(host, one.owner)], wait)


async def age(host: Host, seconds: int) -> None:
    """Have the lease look as if it had been renewed so much earlier."""
    content = (await host.read_file(f"{LEASED}/lease") or b"").split(b"\n")
    start, renewed = content[3].split()
    content[3] = b"%s %d" % (start, int(renewed) - 100 * seconds)
    await host.write_files({f"{LEASED}/lease": File(b"\n".join(content), 0o600)})


@pytest.mark.usefixtures("place")
class TestLeases:
    async def test_taken_checked_and_given_back(self, host: Host, console: Console) -> None:
        """Its number counts up with every taking, and nothing else is left in the directory."""
        for number in (1, 2):
            one = lease("first")
            await take(one, host)
            assert one.numbers == {host.address: number}
            await one.check(host)
            await one.release({"a": host})
            with pytest.raises(errors.LeaseLost):
                await one.check(host)
        assert console.modes(LEASED) == {".lease.lock": "600", "lease": "600"}
        content = await host.read_file(f"{LEASED}/lease")
        assert (content or b"").startswith(b"2\n\n\n")

    async def test_its_number_never_goes_back(self, host: Host) -> None:
        """Not where somebody deleted its file, nor where all is gone that another host has."""
        first, second, third = lease("first"), lease("second"), lease("third")
        await take(first, host)
        await host.remove_tree(f"{LEASED}/lease", below=LEASED)
        await take(second, host)
        assert second.numbers == {host.address: 2}
        assert (await host_records.read(host, LEASED)).lease == 2
        await host.remove_tree(LEASED, below=PLACE)
        third.floor = 7
        await take(third, host)
        assert third.numbers == {host.address: 8}

    async def test_held_is_told_with_owner_and_age(self, host: Host) -> None:
        """And how long until a dead one is given up."""
        first = lease("run 'first' (http://ui/1)", lasts=600)
        await take(first, host)
        await age(host, 100)
        second = lease("second", lasts=600)
        with pytest.raises(errors.LeaseHeld) as caught:
            await take(second, host, wait=0.2)
        expected = (
            r"run 'first' \(http://ui/1\) is working on leased \(renewed 10\d s ago, from else"
        )
        caught.match(expected)
        caught.match("dead run loses its lease after 600 s")
        await first.check(host)

    async def test_the_next_run_goes_on_when_the_lease_is_given_back(self, host: Host) -> None:
        first, second, told = lease("first"), lease("second"), asyncio.Queue[str]()
        await take(first, host)
        waiting = asyncio.ensure_future(second.take([(host, second.owner)], 30, told.put_nowait))
        assert "first is working on leased" in await told.get()
        await first.release({"a": host})
        await waiting
        assert told.empty()
        await second.check(host)
        # What another holds is not given back.
        await first.release({"a": host})
        await second.check(host)

    async def test_abandoned_ones_are_taken_over(self, host: Host) -> None:
        """The one that was overtaken learns of it before its next change."""
        first, second = lease("first", lasts=600), lease("second", lasts=600)
        await take(first, host)
        await age(host, 590)
        with pytest.raises(errors.LeaseHeld):
            await take(second, host)
        await age(host, 610)
        await take(second, host)
        assert second.numbers == {host.address: 2}
        with pytest.raises(errors.LeaseLost, match="found that of second"):
            await first.check(host)

    @pytest.mark.parametrize("seconds", [-100_000, 100_000])
    async def test_a_clock_that_is_set_changes_no_age(
        self, host: Host, console: Console, seconds: int
    ) -> None:
        first, second = lease("first", lasts=600), lease("second", lasts=600)
        await take(first, host)
        console.date(f"{LEASED}/lease", seconds)
        with pytest.raises(errors.LeaseHeld, match=r"renewed \d s ago"):
            await take(second, host)
        await age(host, 610)
        console.date(f"{LEASED}/lease", seconds)
        await take(second, host)

    async def test_one_from_before_the_host_started_is_as_old_as_that(self, host: Host) -> None:
        await take(lease("first"), host)
        lines = (await host.read_file(f"{LEASED}/lease") or b"").split(b"\n")
        up = int(lines[3].split()[1]) // 100
        lines[3] = b"another-start 10"
        await host.write_files({f"{LEASED}/lease": File(b"\n".join(lines), 0o600)})
        with pytest.raises(errors.LeaseHeld, match="renewed") as caught:
            await take(lease("second", lasts=1 << 40), host)
        told = int(str(caught.value).partition("renewed ")[2].split()[0])
        assert up <= told <= up + 60
        await take(lease("second", lasts=up), host)

    async def test_owner_that_is_provably_dead_is_taken_over_at_once(self, host: Host) -> None:
        """It was on this machine, in this boot, and its process has ended."""
        child = await asyncio.create_subprocess_exec("true")
        await child.wait()
        mine = this_process()
        await take(lease("dead", **{**mine, "pid": child.pid}), host)
        await take(lease("next"), host)
        with pytest.raises(errors.LeaseHeld):
            await take(lease("alive", **mine), host)

    async def test_renewal_makes_it_young_again(self, host: Host) -> None:
        first, second = lease("first", lasts=2), lease("second", lasts=60)
        async with first.held({"a": host}):
            await take(first, host)
            await age(host, 50)
            while True:
                with pytest.raises(errors.LeaseHeld, match=r"renewed \d+ s ago") as caught:
                    await take(second, host)
                if "renewed 5" not in str(caught.value):
                    break
                await asyncio.sleep(0.1)
        await take(second, host)

    async def test_renewal_tells_that_the_lease_is_lost(self, host: Host) -> None:
        """All that waits for something can give up then; the other's lease stays as it is."""
        first, lost = lease("first", lasts=1), list[str]()
        first.watchers.append(lost.append)
        other = b"9\nother\n{}\n"
        async with first.held({"a": host}):
            await take(first, host)
            await host.write_files({f"{LEASED}/lease": File(other, 0o600)})
            while not lost:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert "expected this run's lease" in lost[0]
        assert await host.read_file(f"{LEASED}/lease") == other

    async def test_a_deleted_one_is_told_as_that(self, host: Host) -> None:
        """By the next renewal, and before the next change."""
        first, lost = lease("first", lasts=1), list[str]()
        first.watchers.append(lost.append)
        async with first.held({"a": host}):
            await take(first, host)
            await host.remove_tree(f"{LEASED}/lease", below=LEASED)
            while not lost:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert "somebody deleted the file" in lost[0]
        second = lease("second")
        await take(second, host)
        await host.remove_tree(f"{LEASED}/lease", below=LEASED)
        with pytest.raises(errors.LeaseLost, match="somebody deleted the file"):
            await second.check(host)

    async def test_other_deployments_leases_are_reported(self, host: Host) -> None:
        """With what they are going to use, so that nothing is used twice."""
        other = lease("other", root=f"{PLACE}/other", ports=(9000,), devices=(0, 1))
        await take(other, host)
        mine = lease("mine")
        await take(mine, host)
        (reported,) = mine.others[host.address]
        assert reported.owner == other.owner
        await other.release({"a": host})
        await mine.release({"a": host})
        again = lease("again")
        await take(again, host)
        assert again.others[host.address] == []

    async def test_a_directory_that_is_gone_is_a_lease_lost(self, host: Host) -> None:
        one = lease("first")
        await take(one, host)
        await host.remove_tree(LEASED, below=PLACE)
        with pytest.raises(errors.LeaseLost, match="somebody deleted the file"):
            await one.check(host)
        # Giving it back makes no directory.
        await one.release({"a": host})
        assert await host.facts.missing_paths([LEASED]) == [LEASED]


@pytest.mark.usefixtures("place")
class TestDisks:
    """What a full or a read-only disk does."""

    async def test_a_full_one_keeps_no_lease_from_being_taken_renewed_and_given_back(
        self, host: Host, console: Console
    ) -> None:
        """Its number goes on, and nothing is left behind."""
        with console.small_disk(PLACE):
            before = lease("before")
            await take(before, host)
            await before.release({"a": host})
            console.fill(PLACE)
            for number in (2, 3):
                first = lease("first", lasts=2)
                async with first.held({"a": host}):
                    await take(first, host)
                    assert first.numbers == {host.address: number}
                    taken = await host.read_file(f"{LEASED}/lease")
                    # Until it is renewed.
                    while await host.read_file(f"{LEASED}/lease") == taken:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                    await first.check(host)
            assert console.modes(LEASED).keys() == {".lease.lock", "lease"}

    async def test_a_first_lease_on_a_full_one_is_refused(
        self, host: Host, console: Console
    ) -> None:
        with console.small_disk(PLACE):
            console.fill(PLACE)
            with pytest.raises(errors.DiskFull, match=f"{LEASED}/lease: its disk is full") as full:
                await take(lease("first"), host)
            assert full.value.host == host.where
            assert console.modes(LEASED).keys() == {".lease.lock"}

    async def test_a_write_to_a_full_one_says_so_and_leaves_what_was_there(
        self, host: Host, console: Console
    ) -> None:
        with console.small_disk(PLACE):
            path = f"{PLACE}/file"
            await host.write_files({path: File(b"old")})
            console.fill(PLACE)
            for content in (b"new", b"larger" * 5000):
                with pytest.raises(errors.DiskFull, match=f"{path}: its disk is full") as full:
                    await host.write_files({path: File(content)})
                assert full.value.host == host.where
            assert await host.read_file(path) == b"old"
            assert not [name for name in console.modes(PLACE) if name.endswith(".tmp")]
            assert await host.remove_tree(path, below=PLACE)

    async def test_a_read_only_one_says_so_and_stays_as_it_is(
        self, host: Host, console: Console
    ) -> None:
        with console.small_disk(PLACE):
            path = f"{PLACE}/file"
            await host.write_files({path: File(b"old")})
            before = lease("before")
            await take(before, host)
            await before.release({"a": host})
            released = await host.read_file(f"{LEASED}/lease")
            console.make_read_only(PLACE)
            for call in (
                host.write_files({path: File(b"new")}),
                host.make_dirs([f"{PLACE}/directory"]),
                host.remove_tree(path, below=PLACE),
                take(lease("first"), host),
            ):
                with pytest.raises(errors.DiskReadOnly, match=f"{PLACE}/.*read-only") as refused:
                    await call
                assert refused.value.host == host.where
            assert await host.read_file(path) == b"old"
            assert await host.read_file(f"{LEASED}/lease") == released
