"""The command line: what it prints, and with which exit code."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import example as seen
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pd_deploy.cli import execute, planned, shell
from pd_deploy.cli import main as cli
from pd_deploy.config.load import load_deployment
from pd_deploy.config.models import Deployment
from pd_deploy.planning import placement
from pd_deploy.planning.plans import Plan, PlannedFile
from pd_deploy.records.releases import Record
from tests.unit import example


class Result:
    """How a call of `pd-deploy` ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls `pd-deploy` with arguments, in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["pd-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, printed.out, printed.err)

    return run


def write_facts(path: Path, of: Deployment) -> None:
    known = {
        name: {"interface": f.interface, "device_addresses": f.device_addresses}
        for name, f in example.facts(of).items()
    }
    path.write_text(json.dumps({"image": example.IMAGE, "hosts": known}))


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """A facts file for the example."""
    path = tmp_path / "facts.json"
    write_facts(path, example.service())
    return path


IMPORTED = """
import sys
from pd_deploy.cli.main import main
slow, sys.argv = set(sys.argv[1].split()), ["pd-deploy", *sys.argv[2:]]
try:
    main()
finally:
    print(*sorted(slow & set(sys.modules)), file=sys.stderr)
"""
WAYS_TO_HOSTS = "prefect docker asyncssh httpx asyncio"
MODELS = f"{WAYS_TO_HOSTS} pydantic yaml pd_deploy.config.models"


@pytest.mark.parametrize(
    ("arguments", "slow"),
    [
        (["--help"], MODELS),
        (["check", "--help"], f"{WAYS_TO_HOSTS} pd_deploy.config.models"),
        (["init", "--help"], f"{WAYS_TO_HOSTS} pd_deploy.config.models"),
        (["check", example.FILE], f"{WAYS_TO_HOSTS} pd_deploy.planning.plans"),
    ],
)
def test_a_command_imports_no_more_than_it_needs(arguments: list[object], slow: str) -> None:
    """Prefect, SSH, Docker and HTTP take most of the CPU that such a command would need; models
    take most of the rest."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, slow, *map(str, arguments)],
        cwd=example.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout
    assert done.stderr.split() == []


def test_status_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """Most of what a user waits for is Python's imports."""
    file = tmp_path / "file.yaml"
    nobody = {
        name: {"address": f"10.0.0.{i}", "ssh": {"address": "127.0.0.1", "port": 1}}
        for i, name in enumerate("ab", 1)
    }
    file.write_text(yaml.safe_dump(example.document({"ssh": None, "hosts": nobody})))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, "prefect rich pygments asyncssh", "status", str(file)],
        check=False,
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    assert done.stdout.startswith("qwq-3p1d: not known")
    assert done.stdout.count("connection refused") == 4
    assert done.stderr.split() == ["asyncssh"]
    assert done.returncode == 1


def test_the_installed_command_checks_a_file() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("pd-deploy"), "check", example.FILE],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "The file is valid." in done.stdout
    assert done.stderr == ""


def test_version_is_the_installed_one(call: Any) -> None:
    done = call("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"pd-deploy {metadata.version('pd-deploy')}\n"


def test_check_shows_every_instance_and_its_ports(call: Any) -> None:
    done = call("check", example.FILE)
    assert (done.code, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines()]
    assert ["p2", "prefill", "b", "10.0.0.2:9002", "0,1,2,3,4,5,6,7", "8002", "5570"] in rows
    assert ["d0", "decode", "b", "10.0.0.2:9100", "8,9,10,11,12,13,14,15", "8100", "5668"] in rows
    assert ["c0", "proxy", "a", "10.0.0.1:7000"] in rows


def test_check_says_what_is_unusual(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"extends: {example.FILE}\ncompat: upstream\nallow: [ports-distinct]\n")
    out = call("check", path).out
    assert "values as upstream has them in the QwQ-32B 3P1D template of release 0.3.0\n" in out
    assert "allowed to break the rules ports-distinct, batched-tokens, decode-gear-list\n" in out


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("qwq-32b-a2", "values as upstream has them in omni_cli's profile qwq_32b_bf16_a2_3p1d"),
        ("deepseek-r1-a3-2p1d", "ds_r1_w8a8c16_a3_2p1d of March 2026, without its expert placem"),
        ("./own.yaml", "profile own.yaml, which does not say where upstream has them\n"),
        ("./named.yaml", "values as upstream has them in my notes\n"),
    ],
)
def test_check_says_what_the_values_of_upstream_stand_for(
    call: Any, tmp_path: Path, profile: str, says: str
) -> None:
    for name, source in (("own", ""), ("named", "source: my notes, ")):
        text = (
            f"profile: qwq-32b-a3\nupstream: {{{source}decode: {{gpu_memory_utilization: 0.5}}}}\n"
        )
        (tmp_path / f"{name}.yaml").write_text(text)
    path = tmp_path / "x.yaml"
    two = "prefill: {p1: null, p2: null}\ndecode: {d0: {devices: 0-7}}\n"
    path.write_text(f"extends: {example.FILE}\ncompat: upstream\nprofile: {profile}\n{two}")
    done = call("check", path)
    assert says.replace("own.yaml", f"{tmp_path}/own.yaml") in done.out, done.err


@pytest.mark.parametrize("file", sorted((example.ROOT / "deployments").glob("*.yaml")), ids=str)
def test_every_deployment_of_the_project_checks_and_renders(
    call: Any, tmp_path: Path, file: Path
) -> None:
    of = load_deployment(file)
    path = tmp_path / "facts.json"
    write_facts(path, of)
    assert call("check", file).code == 0
    done = call("plan", file, "--facts", path, "--format", "json")
    assert (done.code, done.err) == (0, "")
    names = Plan.model_validate_json(done.out).roles
    placed = placement.build(of)
    assert len(names) == len(placed.instances) + 1


def test_image_replaces_the_files_own(call: Any) -> None:
    assert (
        "image other:20250723_1\n" in call("check", example.FILE, "--image", "other:20250723_1").out
    )


@pytest.mark.parametrize("command", ["check", "plan", "deploy"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("nam: x\npull: 1\n", ["nam: is not a known key; did you mean name?", "pull: expected"]),
        (
            "hosts: {b: 10.0.0.1}\nprefill: {p1: {devices: 0-7}}\n",
            ["hosts.b: expected an address of its own", "prefill.p1.devices: expected devices"],
        ),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_invalid_file_is_2_with_all_problems_on_stderr(
    call: Any, tmp_path: Path, command: str, content: str, says: list[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"extends: {example.FILE}\n{content}")
    done = call(command, path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("pd-deploy: ")
    assert "Traceback" not in done.err
    assert [text for text in says if text not in done.err] == []


def test_settings_that_prefect_refuses_are_named_without_their_values(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises as soon as it is imported."""
    from prefect.settings.models.api import APISettings

    def refused(*_: object, **__: object) -> None:
        APISettings(request_timeout="s3cret")

    monkeypatch.setattr(cli, "app", refused)
    done = call("follow")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("pd-deploy: Prefect can't use its settings: request_timeout: Input")
    assert "s3cret" not in done.err


def test_missing_file_is_2(call: Any, tmp_path: Path) -> None:
    done = call("check", tmp_path / "none.yaml")
    assert (done.code, done.out) == (2, "")
    assert "none.yaml: 1 problem\n  cannot be read: No such file or directory" in done.err


@pytest.mark.parametrize("format", ["text", "json", "shell"])
def test_a_plan_of_the_newest_image_is_what_the_registry_says(
    call: Any, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    asked = []

    def of(service: Deployment, image: str | None) -> SimpleNamespace:
        asked.append((service.image, image))
        plan, said = example.plan(), "contract v0; the image has it"
        return SimpleNamespace(
            plan=plan,
            said=said,
            away={},
            rows=[],
            history=SimpleNamespace(record=Record()),
            known_of_image={"contract": "v0"},
            require_plan=lambda *, of_all: plan,
        )

    monkeypatch.setattr(planned, "of", of)
    done = call("plan", example.FILE, "--image", "newest", "--format", format)
    assert (done.code, done.err) == (0, "")
    assert example.IMAGE in done.out
    assert asked == [(load_deployment(example.FILE).image, "newest")]


@pytest.mark.parametrize("command", ["check", "plan", "deploy"])
def test_no_newest_image_of_a_tag_that_belongs_to_no_family(
    call: Any, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        f"extends: {example.FILE}\nimage: registry.example/omniinfer:mine\n"
        "kv_parallel_size: decode-tensor-parallel\n"
    )
    assert call("check", path).code == 0
    done = call(command, path, "--image", "newest")
    assert (done.code, done.out) == (2, "")
    assert "update: expected a family of tags, found the tag mine" in done.err


def test_no_newest_image_offline(call: Any, facts: Path) -> None:
    done = call("plan", example.FILE, "--facts", facts, "--image", "newest")
    assert (done.code, done.out) == (2, "")
    assert "--image: expected an image by name with --facts" in done.err


@pytest.mark.parametrize("content", [f"{shell._END}\nrm -rf /\n{shell._END}_", "a\nb", "$(id)\n"])
def test_no_content_leaves_its_file_in_a_printed_script(tmp_path: Path, content: str) -> None:
    """The script would run the lines that follow the end of a here-document."""
    path = tmp_path / "a file's"
    lines = shell._write(PlannedFile(path=str(path), content=content, mode="600"))
    done = subprocess.run(
        ["sh", "-eu"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert path.read_text().rstrip("\n") == content.rstrip("\n")


ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
HOSTILE = st.one_of(ANY, st.text("-='\"\\$`\n\r\t;&|<>#!*~(){}[] ax", max_size=8))


@settings(max_examples=40, deadline=None)
@given(argv=st.lists(HOSTILE, max_size=8), ended=st.booleans())
@seen(argv=["P\x80", "PD_DEPLOY_END\xff"], ended=False)
def test_any_values_reach_the_commands_of_a_printed_script_as_they_are(
    argv: list[str], ended: bool
) -> None:
    """As words of a command, and as the content and the name of a file."""
    content = "\n".join([*argv, shell._END, *argv]) + "\n" * ended
    file = PlannedFile(path="".join(argv), content=content, mode="600")
    lines = [
        "docker() { printf '%s\\0' docker \"$@\"; }",
        "install() { printf '%s\\0' \"$4\"; cat; }",
        shell._wrapped(["docker", "create", *argv]),
        *shell._write(file),
    ]
    script = "\n".join(lines).encode()
    done = subprocess.run(["sh", "-eu"], input=script, capture_output=True, check=True)
    assert done.stderr == b""
    *words, written = done.stdout.decode().split("\0")
    assert words == ["docker", "create", *argv, file.path]
    assert written == content.removesuffix("\n") + "\n"


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "/none", "/" + "x" * 5000])
def test_a_key_that_cannot_be_used_is_2_when_it_is_saved(call: Any, path: str) -> None:
    """And so are known hosts; nothing is saved, and no content is shown."""
    for option in ("--private-key", "--known-hosts"):
        done = call("credentials", "ssh", "x", option, path)
        assert (done.code, done.out) == (2, "")
        assert f"{option}: {path}: " in done.err
        assert "root:" not in done.err


class TestPlanOffline:
    def test_json_is_the_plan(self, call: Any, facts: Path) -> None:
        done = call("plan", example.FILE, "--facts", facts, "--format", "json")
        assert (done.code, done.err) == (0, "")
        found, made = Plan.model_validate_json(done.out), example.plan()
        assert (found.generation, found.pinned_image) == (made.generation, example.IMAGE)
        assert json.loads(done.out)["image_facts"] == {}
        for name, host in made.hosts.items():
            assert found.hosts[name].model_copy(update={"actions": []}) == host

    def test_text_shows_containers_commands_and_files_of_each_host(
        self, call: Any, facts: Path
    ) -> None:
        done = call("plan", example.FILE, "--facts", facts, "--full")
        made = example.plan()
        assert (done.code, done.err) == (0, "")
        for host in made.hosts.values():
            wanted = [host.address, *host.directories]
            wanted += [file.path for file in host.files]
            for instance in host.instances.values():
                wanted.append(instance.container.name)
                wanted += [f"{k}={v}" for k, v in instance.command.environment.items()]
            assert [text for text in wanted if text not in done.out] == []
        assert f"generation {made.generation}\nimage {example.IMAGE}\n" in done.out

    def test_by_default_the_text_has_what_changes_on_each_host_and_the_next_command(
        self, call: Any, facts: Path
    ) -> None:
        done = call("plan", example.FILE, "--facts", facts)
        assert (done.code, done.err) == (0, "")
        made = example.plan()
        for host in made.hosts.values():
            for instance in host.instances.values():
                assert f"would create {instance.container.name}\n" in done.out
                assert f"would start {instance.container.name}\n" in done.out
        assert "PREFILL_POD_NUM" not in done.out
        assert "would open port 7000" in done.out
        assert f"Next: pd-deploy deploy {example.FILE}" in done.out

    def test_generations_on_the_hosts_decide_the_epoch(self, call: Any, facts: Path) -> None:
        known = json.loads(facts.read_text())
        facts.write_text(json.dumps(known | {"generations": ["4-0123abcd"]}))
        done = call("plan", example.FILE, "--facts", facts, "--format", "json")
        assert json.loads(done.out)["generation"].startswith("5-")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", ["not valid JSON: EOF"]),
            ("[]", ["expected "]),
            ("\udcff", ["expected UTF-8 text"]),
            ("{}", ["hosts: is missing"]),
            ('{"hosts": {}}', ["hosts.a: is missing", "hosts.b: is missing"]),
            (
                '{"hosts": {"a": {"interfac": "x"}}}',
                [
                    "hosts.a.interface: is missing",
                    "hosts.a.interfac: is not a known key; did you mean interface?",
                ],
            ),
            ('{"host": {}, "hosts": {}}', ["host: is not a known key; did you mean hosts?"]),
            (
                '{"hosts": {"a": {"interface": "", "device_addresses": {"x": "1.1.1.1", "0": 1}}}}',
                [
                    "hosts.a.interface: expected text, not empty",
                    "hosts.a.device_addresses.x: expected a whole number, found 'x'",
                    "hosts.a.device_addresses.0: expected text, found 1",
                ],
            ),
            (
                '{"hosts": {"a": {"interface": "x"}, "b": {"interface": "x"}}}',
                [
                    "hosts.a.device_addresses.0: is missing; p0 uses it",
                    "hosts.b.device_addresses.15: is missing; d0 uses it",
                ],
            ),
        ],
    )  # fmt: skip
    def test_problems_of_the_facts_file_are_2_and_all_named(
        self, call: Any, tmp_path: Path, content: str, says: list[str]
    ) -> None:
        path = tmp_path / "facts.json"
        path.write_bytes(content.encode(errors="surrogateescape"))
        done = call("plan", example.FILE, "--facts", path)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"pd-deploy: {path}: ")
        assert [text for text in says if text not in done.err] == []

    def test_devices_with_the_same_address_are_named(self, call: Any, facts: Path) -> None:
        known = json.loads(facts.read_text())
        known["hosts"]["b"]["device_addresses"] = known["hosts"]["a"]["device_addresses"]
        facts.write_text(json.dumps(known))
        done = call("plan", example.FILE, "--facts", facts)
        assert (done.code, done.out) == (1, "")
        assert "192.168.1.100 is the address of device 0 on a and of device 0 on b" in done.err

    def test_missing_facts_file_is_2(self, call: Any, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "none.json"):
            done = call("plan", example.FILE, "--facts", path)
            assert done.code == 2
            expected = (
                "expected a file, found a dir" if path.is_dir() else "cannot be read: No such"
            )
            assert f"{path}: 1 problem\n  {expected}" in done.err


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        (
            "",
            [
                "init",
                "check",
                "plan",
                "deploy",
                "follow",
                "credentials",
                "lab",
                "Exit codes: 0 success",
            ],
        ),
        (
            "init",
            [
                "DIR",
                "--example",
                "lab-qwq-3p1d",
                "Existing files are never overwritten",
                "Example:",
            ],
        ),
        (
            "check",
            ["FILE", "--image", "without connecting to any host", "Example: pd-deploy check"],
        ),
        ("plan", ["FILE", "--facts", "device_addresses", "--format", "Example: pd-deploy plan"]),
        ("deploy", ["FILE", "--stage", "--dry-run", "PREFECT_API_URL", "Example: pd-deploy"]),
        ("follow", ["flow run's id", "exit code is that of `deploy`: 0"]),
        ("credentials ssh", ["--private-key", "--known-hosts", "never given as", "Example:"]),
        ("credentials registry", ["--username", "prompted for the password", "Example:"]),
        ("lab", ["up", "down", "status"]),
        ("lab up", ["pd-deploy lab up", "root", "--subnet"]),
        ("lab down", ["--name"]),
        ("lab exec", ["HOST", "docker ps"]),
        ("lab cut", ["HOST"]),
    ],
)
def test_help_says_what_a_command_needs(call: Any, command: str, needs: list[str]) -> None:
    done = call(*command.split(), "--help")
    assert (done.code, done.err) == (0, "")
    unwrapped = " ".join(done.out.split()).replace("- ", "-")  # names are wrapped at their hyphens
    assert [text for text in needs if text not in unwrapped] == []


@pytest.mark.parametrize(
    "arguments",
    [["check"], ["chek"], ["plan", example.FILE, "--format", "xml"], ["check", "a", "b"]],
    ids=str,
)
def test_wrong_use_is_2_with_a_way_to_the_help(call: Any, arguments: list[object]) -> None:
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "--help" in done.err


def test_init_writes_a_directory_and_says_what_follows(call: Any, tmp_path: Path) -> None:
    done = call("init", tmp_path / "new", "--example", "lab-qwq-3p1d")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"wrote {tmp_path}/new/lab-qwq-3p1d.yaml\n")
    assert "pd-deploy check lab-qwq-3p1d.yaml" in done.out
    again = call("init", tmp_path / "new", "--example", "qwq-3p1d")
    assert (again.code, again.out) == (2, "")
    assert "qwq-3p1d.yaml: exists already" in again.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["chek"], 2, "pd-deploy lab --help' for help"),
        (["exec", "--name", "none-such", "a", "--", "ls", "--help"], 1, "no lab none-such"),
    ],
)
def test_the_labs_commands_get_all_that_follows_their_name(
    call: Any, arguments: list[object], code: int, says: str
) -> None:
    done = call("lab", *arguments)
    assert (done.code, done.out) == (code, "")
    assert says in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    variables = {
        "bash": {"COMP_WORDS": "pd-deploy rel", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "pd-deploy rel"},
        "fish": {
            "_TYPER_COMPLETE_ARGS": "pd-deploy rel",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
    }[shell]
    done = subprocess.run(
        [Path(sys.executable).with_name("pd-deploy")],
        env={"PATH": "/usr/bin:/bin", "_PD_DEPLOY_COMPLETE": f"complete_{shell}", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "releases" in done.stdout
    assert "rollback" not in done.stdout


@pytest.mark.parametrize("before", [["--"], []], ids=["as documented", "without --"])
def test_exec_runs_what_follows_the_instance(
    monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    """Options in it are the command's own."""
    ran: list[object] = []

    def run(_: object, instance: str, argv: list[str]) -> int:
        ran.append((instance, argv))
        return 3

    monkeypatch.setattr(execute, "run", run)
    done = CliRunner().invoke(
        cli.app, ["exec", str(example.FILE), "p1", *before, "ls", "--help", "--", "x"]
    )
    assert done.exit_code == 3
    assert ran == [("p1", ["ls", "--help", "--", "x"])]


def test_a_file_that_cannot_be_written_is_named_without_a_traceback(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/capture-a.json")

    monkeypatch.setattr(cli, "app", fails)
    ended = call("capture", example.FILE)
    assert (ended.code, ended.err) == (1, "pd-deploy: /srv/capture-a.json: Permission denied\n")
