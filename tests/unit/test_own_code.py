"""The user's own source code: what of a tree is deployed, and what becomes of it on the hosts."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pd_deploy.cli import watch
from pd_deploy.code import in_container, reading, tree
from pd_deploy.code.reading import Source
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import CodeTree
from pd_deploy.config.rule_names import RULES
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.errors import InvalidInput
from pd_deploy.flows.deploy import deploy
from pd_deploy.flows.rollback import rollback
from pd_deploy.planning import placement, rules
from tests.memory import answers
from tests.memory.calls import Moment
from tests.memory.world import ROOT, Outcome, World
from tests.unit import example

FILES = {
    "omni/__init__.py": "version = 1\n",
    "omni/engine.py": "",
    "omni/accelerators/sched/global_proxy/global_proxy.sh": "#!/bin/bash\n",
    "tools/run.sh": "#!/bin/bash\n",
}


def write(top: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(text)
    return top


def git(top: Path, *arguments: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=top, check=True, capture_output=True)
    return done.stdout.decode().strip()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tree without git."""
    return write(tmp_path / "plain", FILES)


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A tree that is a git repository."""
    top = write(tmp_path / "git", FILES | {".gitignore": "build/\n*.log\n"})
    git(top, "init", "--quiet")
    git(top, "add", ".")
    git(top, "commit", "--quiet", "--message", "x")
    return top


def read(source: Path | str) -> Source:
    return reading.read(str(source))


def paths(source: Source) -> set[str]:
    return {entry.path for entry in source.tree.entries}


class TestReading:
    def test_what_git_ignores_stays_and_is_named(self, committed: Path) -> None:
        extra = {"build/lib.py": "", "x.log": "", "new.py": "", ".env": "KEY=1", "sub/id_rsa": ""}
        found = read(write(committed, extra))
        assert paths(found) == {*FILES, ".gitignore", "new.py"}
        assert "build/, x.log (ignored by git)" in found.detail
        assert ".env, sub/id_rsa (looks like a secret)" in found.detail
        assert found.commit == git(committed, "rev-parse", "HEAD")

    def test_a_commit_of_a_repository_is_read_as_it_was(
        self, committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "CACHE", tmp_path / "cache")
        commit = git(committed, "rev-parse", "HEAD")
        as_committed = read(committed).tree.digest
        (committed / "later.py").write_text("")
        found = read(f"file://{committed}@{commit}")
        assert found.tree.digest == as_committed != read(committed).tree.digest
        assert found.commit == commit
        with pytest.raises(InvalidInput, match="expected the commit 0000"):
            read(f"file://{committed}@{'0' * 40}")

    def test_hostile_names_and_modes_arrive_as_they_are(self, plain: Path) -> None:
        odd = ["a\nb", "-rf", "x y", "\udcff", "'$(reboot)'"]
        for name in odd:
            (plain / name).write_text(name.encode(errors="surrogateescape").hex())
        (plain / "tools/run.sh").chmod(0o755)
        (plain / "link").symlink_to("omni/engine.py")
        (plain / "dangling").symlink_to(".#lock")
        found = read(plain)
        unpacked = plain.parent / "unpacked"
        unpack(found, unpacked)
        assert in_container.look(str(unpacked / "new")) == found.tree.digest
        assert (unpacked / "new/a\nb").read_text() == b"a\nb".hex()
        assert os.access(unpacked / "new/tools/run.sh", os.X_OK)
        assert not os.access(unpacked / "new/x y", os.X_OK)
        assert set(odd) <= {path.name for path in (unpacked / "new").iterdir()}

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda top: (top / "out").symlink_to("/etc/passwd"), "links that stay in the tree"),
            (lambda top: (top / "out").symlink_to("../.."), "links that stay in the tree"),
            (lambda top: os.truncate(top / "omni/engine.py", 200 << 20), "at most 100 MiB"),
        ],
        ids=["absolute", "above", "huge"],
    )
    def test_what_cannot_be_deployed_is_refused_by_name(
        self, plain: Path, make: Callable[[Path], None], says: str
    ) -> None:
        make(plain)
        with pytest.raises(InvalidInput, match=f"{says}.*found (out|omni/engine.py)"):
            read(plain)

    def test_what_is_no_file_is_left_out_with_a_word(self, plain: Path) -> None:
        os.mkfifo(plain / "pipe")
        write(plain, {"omni/__pycache__/x.pyc": "", "sub/.git/config": "", "x/.git": "gitdir: y"})
        found = read(plain)
        assert paths(found) == FILES.keys()
        assert "pipe (neither a file nor a link)" in found.detail
        assert ".git" not in found.detail

    def test_a_tree_that_git_refuses_to_read_is_not_read_without_it(
        self, plain: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (plain / ".git").mkdir()
        with pytest.raises(InvalidInput, match="`git rev-parse` failed: fatal: not a git repo"):
            read(plain)
        monkeypatch.setenv("PATH", "/nonexistent")
        with pytest.raises(InvalidInput, match="`git rev-parse` failed: git is not installed"):
            read(plain)

    @pytest.mark.parametrize("name", ["none", "file"])
    def test_no_directory_is_a_clear_error(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidInput, match=f"expected a directory, found (a )?{name}"):
            read(tmp_path / name)


class TestPatches:
    PATCH = "--- a/engine.py\n+++ b/engine.py\n@@ -0,0 +1 @@\n+patched = 1\n"

    def test_they_are_applied_to_a_copy_in_their_order(self, plain: Path) -> None:
        second = "--- a/engine.py\n+++ b/engine.py\n@@ -1 +1 @@\n-patched = 1\n+patched = 2\n"
        write(plain, {"patches/1.patch": self.PATCH, "patches/2.patch": second})
        (plain / "tools/run.sh").chmod(0o755)
        patches = {"omni": ("patches/1.patch", "patches/2.patch")}
        found = reading.read(str(plain), patches)
        (entry,) = [e for e in found.tree.entries if e.path == "omni/engine.py"]
        assert found.content(entry) == b"patched = 2\n"
        assert (plain / "omni/engine.py").read_text() == ""
        others = {e for e in found.tree.entries if e != entry}
        assert others < set(read(plain).tree.entries)
        with pytest.raises(InvalidInput, match=r"2\.patch applies in omni, found: .*patch"):
            reading.read(str(plain), {"omni": ("patches/2.patch",)})

    def test_a_patch_that_is_not_there_is_named(self, plain: Path) -> None:
        with pytest.raises(InvalidInput, match=r"expected that x\.patch applies in none, found"):
            reading.read(str(plain), {"none": ("x.patch",)})


@pytest.mark.parametrize(
    ("contract", "lines"),
    [
        ("v0-early", ['pip install --no-deps --no-build-isolation -e "$tree" ||']),
        (
            "roles",
            [
                "pip uninstall -y omni-npu ||",
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 pip install --no-deps --no-build-isolation "
                '--force-reinstall -e "$tree/components/omni-npu" ||',
            ],
        ),
    ],
)
def test_code_is_installed_as_images_of_each_age_want_it(contract: str, lines: list[str]) -> None:
    image = "omni:mine"
    of = {"contract": contract, "image": image, "code": {"source": "/x", "install": "pip"}}
    of |= {"proxy": {"c0": {"prefill_lb_sdk": None, "decode_lb_sdk": None}}}
    of |= {"prefill": {"p1": {"environment": {"VLLM_LLMDATADIST_BASE_PORT": 15600}}}}
    plan = example.plan({**of, "allow": list(RULES)})
    copy = "mkdir -p /workspace && rm -rf /workspace/omniinfer && cp -a /pd-deploy/code"
    for name in ("p0", "d0", "c0"):
        script = plan.instance(name).start_script.content
        assert copy in script
        assert all((line in script) == (name != "c0") for line in lines)
        (mount,) = [
            m for m in plan.instance(name).container.mounts if m.target == "/pd-deploy/code"
        ]
        assert mount.read_only


def test_vllms_router_sees_no_code_and_its_servers_do() -> None:
    file = example.ROOT / "deployments/vllm-gpu-3p1d.yaml"
    plan = example.plan_of(file, {"code": {"source": "/x", "path": "/opt/vllm"}})
    for name, expected in (("p0", True), ("d0", True), ("c0", False)):
        targets = [m.target for m in plan.instance(name).container.mounts]
        assert ("/opt/vllm" in targets) is expected
    with pytest.raises(InvalidInput, match=r"code\.path: is missing.*\(rule code-path\)"):
        example.plan_of(file, {"code": {"source": "/x"}})


def unpack(source: Source, directory: Path) -> None:
    """What a host does."""
    everything = tree.lacking([source.tree], ())
    (directory / tree.OBJECTS).mkdir(parents=True)
    for batch in tree.batches(everything):
        extract(tree.objects_archive((e, source.content(e)) for e in batch), directory / "objects")
    extract(source.tree.archive(), directory)


def extract(archive: bytes, directory: Path) -> None:
    subprocess.run(["tar", "-xpmf", "-"], cwd=directory, input=archive, check=True)


class TestTree:
    def test_only_what_differs_is_sent_and_each_content_once(self, plain: Path) -> None:
        first = read(plain).tree
        write(plain, {"omni/engine.py": "x = 1\n", "copy.py": "version = 1\n"})
        second = read(plain).tree
        assert [e.path for e in tree.lacking([second], first.objects)] == ["omni/engine.py"]
        assert first.digest != second.digest

    def test_a_program_is_another_object_than_a_file_of_its_content(self, plain: Path) -> None:
        before = read(plain).tree
        (plain / "tools/run.sh").chmod(0o755)
        assert read(plain).tree.digest != before.digest
        assert len(tree.lacking([read(plain).tree], before.objects)) == 1

    def test_batches_are_bounded_and_whole(self) -> None:
        sizes = [1, tree.BATCH_BYTES, 5, 6, 3 * tree.BATCH_BYTES]
        entries = [tree.Entry(str(i), "file", f"{i:064x}", size) for i, size in enumerate(sizes)]
        batches = list(tree.batches(entries))
        assert [e for batch in batches for e in batch] == entries
        assert all(len(b) == 1 or sum(e.size for e in b) <= tree.BATCH_BYTES for b in batches)

    def test_members_belong_to_root_and_their_directories_are_open_to_all(
        self, plain: Path
    ) -> None:
        (plain / "omni").chmod(0o700)
        with tarfile.open(fileobj=io.BytesIO(read(plain).tree.archive())) as archive:
            members = archive.getmembers()
        assert {(m.uid, m.gid) for m in members} == {(0, 0)}
        assert {m.mode for m in members if m.isdir()} == {0o755}

    def test_a_file_that_changes_while_it_is_sent_is_noticed(self, plain: Path) -> None:
        source = read(plain)
        (plain / "omni/engine.py").write_text("changed")
        (entry,) = [e for e in source.tree.entries if e.path == "omni/engine.py"]
        with pytest.raises(InvalidInput, match=r"found omni/engine\.py changed while it was sent"):
            source.content(entry)


class TestInContainer:
    @pytest.mark.parametrize(
        ("text", "fault", "missing"),
        [
            ("", "", ""),
            ("import no_such_thing", "", "ModuleNotFoundError: No module named 'no_such_thing'"),
            ("nonsense(", "SyntaxError", ""),
            ("nothing", "NameError: name 'nothing' is not defined", ""),
        ],
    )
    def test_the_package_is_imported_and_its_place_told(
        self, tmp_path: Path, text: str, fault: str, missing: str
    ) -> None:
        write(tmp_path, {"omni/__init__.py": text})
        question = {"trees": {"servers": str(tmp_path)}, "package": "omni", "path": str(tmp_path)}
        answer = self.asked(question, tmp_path)
        assert answer["package"] == str(tmp_path / "omni/__init__.py")
        assert answer["fault"].startswith(fault)
        assert bool(answer["fault"]) == bool(fault)
        assert answer["missing"] == missing

    def test_a_package_from_elsewhere_is_not_imported(self, tmp_path: Path) -> None:
        write(tmp_path, {"there/omni/__init__.py": "raise SystemExit", "here/x.py": ""})
        question = {"trees": {}, "package": "omni", "path": str(tmp_path / "here")}
        answer = self.asked(question, tmp_path / "there")
        assert answer["package"] == str(tmp_path / "there/omni/__init__.py")

    def asked(self, question: dict[str, object], site: Path) -> dict[str, str]:
        source = Path(in_container.__file__).read_text()
        argv = [sys.executable, "-c", source, json.dumps(question)]
        done = subprocess.run(
            argv, env={"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True
        )
        answer: dict[str, str] = json.loads(done.stdout.removeprefix(in_container.MARK))
        return answer


@pytest.fixture
def world(tmp_path: Path, plain: Path) -> World:
    made = World(tmp_path)
    made.change(code={"source": "plain"})
    return made


def trees(world: World, host: str = "a") -> set[str]:
    return set(world.machines[host].disk.names(f"{ROOT}/.code")) - {"objects"}


def seen(world: World, instance: str, path: str) -> str:
    """A file of the tree, as an instance's container sees it."""
    container = world.running()[instance]
    (source,) = [
        mount["Source"]
        for mount in container.config["HostConfig"]["Mounts"]
        if mount["Target"] == "/workspace/omniinfer"
    ]
    host = next(m for m in world.machines.values() if container in m.containers.values())
    return host.disk.read(f"{source}/{path}")


def sent(outcome: Outcome) -> list[str]:
    return [m.what for m in outcome.moments if m.what in ("receive", "lay out") and m.after]


class TestOnHosts:
    def test_a_changed_tree_is_another_generation_and_a_rollback_brings_the_old_one_back(
        self, world: World, plain: Path
    ) -> None:
        world.deploy()
        first = world.serving()
        assert seen(world, "d0", "omni/__init__.py") == "version = 1\n"
        again = world.run(deploy)
        assert "nothing to do, nothing changed" in again.message
        write(plain, {"omni/__init__.py": "version = 2\n"})
        outcome = world.run(deploy)
        assert outcome.completed, outcome.error
        assert world.serving() != first
        assert seen(world, "p2", "omni/__init__.py") == "version = 2\n"
        outcome = world.run(rollback)
        assert outcome.completed, outcome.error
        assert sent(outcome) == []
        assert world.serving() == first
        assert seen(world, "d0", "omni/__init__.py") == "version = 1\n"
        world.assert_coherent()

    def test_a_change_of_the_proxys_sources_restarts_the_proxy_alone(
        self, world: World, plain: Path
    ) -> None:
        world.deploy()
        before, script = world.runs(), "omni/accelerators/sched/global_proxy/global_proxy.sh"
        write(plain, {script: "#!/bin/bash\n# changed\n"})
        assert world.run(deploy).completed
        after = world.runs()
        assert {name for name in after if after[name] != before[name]} == {"c0"}
        assert seen(world, "c0", script).endswith("# changed\n")
        assert seen(world, "p0", script) == ""

    def test_trees_that_no_generation_uses_are_removed(self, world: World, plain: Path) -> None:
        world.change(keep=1)
        known = list[set[str]]()
        for number in range(3):
            write(plain, {"omni/__init__.py": f"version = {number}\n"})
            assert world.run(deploy).completed
            known.append(trees(world))
        assert len(known[-1]) == 4  # servers' and the proxy's, of two generations
        assert not known[0] & known[-1]
        disk = world.machines["b"].disk
        assert len(trees(world, "b")) == 2
        assert len(disk.names(f"{ROOT}/.code/objects")) == len(FILES)  # two versions of one file

    def test_a_tree_of_another_commit_is_refused_unless_the_file_allows_it(
        self, world: World, committed: Path
    ) -> None:
        image = world.push("20250725_1", answer=answers.of("v0", commit="ab" * 20))
        world.change(code={"source": str(committed)})
        refused = str(world.run(deploy, image=image).error)
        assert f"code.source: expected a tree of the image's commit {'ab' * 20}" in refused
        assert "(rule code-commit)" in refused
        assert not world.containers()
        world.change(allow=["code-commit"])
        assert world.run(deploy, image=image).completed

    def test_code_that_cannot_be_imported_is_refused_before_anything_stops(
        self, world: World, plain: Path
    ) -> None:
        world.deploy()
        before = world.runs()
        write(plain, {"omni/__init__.py": "raise ValueError"})
        refused = str(world.run(deploy).error)
        assert "expected omni to be imported from /workspace/omniinfer, found ValueError" in refused
        assert world.runs() == before
        assert not world.record().quarantine
        write(plain, {"omni/__init__.py": "version = 2\n"})
        assert world.run(deploy).completed
        world.assert_coherent()

    def test_what_somebody_removed_or_damaged_on_a_host_is_sent_again(
        self, world: World, plain: Path
    ) -> None:
        world.deploy()
        disk, before = world.machines["a"].disk, world.runs()
        for digest in trees(world):
            disk.remove(f"{ROOT}/.code/{digest}")
        damaged = f"{ROOT}/.code/objects/{disk.names(f'{ROOT}/.code/objects')[0]}"
        disk.put(damaged, b"damaged")
        outcome = world.run(deploy)
        assert outcome.completed, outcome.error
        assert sent(outcome) == ["receive", "lay out", "lay out"]
        assert world.runs() == before
        assert disk.entries[damaged].content != b"damaged"

    def test_a_rollback_without_its_tree_says_so(self, world: World, plain: Path) -> None:
        world.deploy()
        write(plain, {"omni/__init__.py": "version = 2\n"})
        before = trees(world, "b")
        assert world.run(deploy).completed
        for digest in before:
            world.machines["b"].disk.remove(f"{ROOT}/.code/{digest}")
        serving = world.runs()
        error = str(world.run(rollback).error)
        assert "expected the source tree of generation 1-" in error
        assert world.runs() == serving

    def test_a_run_that_is_killed_while_it_brings_code_is_put_right(
        self, world: World, plain: Path
    ) -> None:
        world.deploy()
        write(plain, {"omni/__init__.py": "version = 2\n"})
        for number in (2, 5):  # after the batch, and while the second tree is laid out
            twin, of_code = world.twin(), list[Moment]()

            def kills(
                moment: Moment, of_code: list[Moment] = of_code, number: int = number
            ) -> bool:
                if moment.what in ("receive", "lay out") and moment.host == "a":
                    of_code.append(moment)
                return len(of_code) == number

            assert twin.run(deploy, kill_at=kills).killed
            assert [m.what for m in of_code] == ["receive", "receive", *["lay out"] * 3][:number]
            twin.pass_by(5)
            outcome = twin.run(deploy)
            assert outcome.completed, f"{of_code}: {outcome.error}"
            assert seen(twin, "p0", "omni/__init__.py") == "version = 2\n"
            twin.assert_coherent()

    def test_a_full_disk_is_told_as_one(self, world: World, plain: Path) -> None:
        world.deploy()
        write(plain, {"omni/large.py": "#" * 5000})
        before, disk = world.runs(), world.machines["b"].disk

        def fill(moment: Moment) -> None:
            if moment.what == "receive" and not moment.after:
                disk.fill("/")

        error = str(world.run(deploy, watch=fill).error)
        assert "host b (10.0.0.2): can't write /var/lib/pd-deploy/qwq-3p1d/.code" in error
        assert "its disk is full" in error
        assert world.runs() == before


@pytest.mark.parametrize(
    ("of_tree", "of_image", "is_refused"),
    [("a", "a", False), ("a", "b", True), ("", "b", True), ("a", "", False), ("", "", False)],
)
def test_commits_are_compared_where_the_image_has_one(
    of_tree: str, of_image: str, is_refused: bool
) -> None:
    code_tree = CodeTree(servers="0" * 64, proxy=None, commit=of_tree)
    of = example.service({"code": {"source": "/x"}}).model_copy(update={"code_tree": code_tree})
    images = [ImageFacts(programs={"start_api_servers.py": "/x"}, commit=of_image)]
    problems = map(str, rules.broken(of, placement.derive(of), images))
    assert any("(rule code-commit)" in problem for problem in problems) is is_refused


@pytest.mark.parametrize("code", ["image", "/data/code", {"source": "/x"}])
def test_code_is_part_of_what_containers_see_only_where_the_file_has_it(code: object) -> None:
    mounts = {
        mount.target: mount.source
        for host in example.plan({"code": code}).hosts.values()
        for instance in host.instances.values()
        for mount in instance.container.mounts
    }
    expected = {"/data/code": "/data/code"} if code == "/data/code" else {}
    if isinstance(code, dict):
        expected = {"/workspace/omniinfer": f"{ROOT}/.code/TREE"}
    found = {t: s for t, s in mounts.items() if t.startswith(("/workspace", "/data/code"))}
    assert found == expected


class TestWatching:
    @pytest.fixture
    def file(self, world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(watch, "POLL_S", 0.01)
        return world.path

    def test_each_change_is_deployed_and_one_during_a_run_by_one_more(
        self, file: Path, plain: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        seen: list[str] = []

        def run() -> int:
            text = (plain / "omni/engine.py").read_text()
            seen.append(text)
            if len(seen) == 1:
                for number in range(3):
                    write(plain, {"omni/engine.py": f"during {number}"})
            elif len(seen) == 2:
                write(plain, {"omni/engine.py": "last"})
            elif len(seen) == 3:
                return 130
            return 0

        assert watch.deploy_on_change(file, run) == 130
        assert seen == ["", "during 2", "last"]
        assert capsys.readouterr().out.count("Changed: deploying again.") == 2

    @pytest.mark.parametrize("ends", ["run", "wait"])
    def test_ctrl_c_ends_it_and_nothing_else(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, ends: str
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        if ends == "wait":
            monkeypatch.setattr(watch.time, "sleep", interrupted)
        code = watch.deploy_on_change(file, lambda: 130 if ends == "run" else 0)
        assert code == (130 if ends == "run" else 0)

    def test_a_file_that_is_broken_for_a_moment_is_told_and_waited_for(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        good, runs = file.read_text(), list[bool]()

        def run() -> int:
            try:
                load_deployment(file)
            except InvalidInput:
                file.write_text(good)
                raise
            runs.append(True)
            file.write_text("nonsense: 1\n")
            return 0 if len(runs) == 1 else 130

        assert watch.deploy_on_change(file, run) == 130
        assert "1 problem" in capsys.readouterr().err

    def test_what_git_ignores_is_no_change(self, committed: Path) -> None:
        before = reading.stamp(str(committed))
        write(committed, {"build/x": "", "y.log": ""})
        assert reading.stamp(str(committed)) == before
        write(committed, {"new.py": ""})
        assert reading.stamp(str(committed)) != before
