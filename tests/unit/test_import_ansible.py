"""From an Ansible inventory and playbook to a deployment file: nothing lost without a word."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pd_deploy import engines
from pd_deploy.cli import main
from pd_deploy.cli.check import load
from pd_deploy.engines.base import HostFacts, Layout, Service
from pd_deploy.errors import InvalidInput
from pd_deploy.importer import documents, expressions, importing, report, shell
from pd_deploy.importer.source import Answers
from pd_deploy.planning import placement
from tests.unit import ansible_files as files
from tests.unit import example
from tests.unit.ansible_files import Profile, Shape

SECRET = "hunter2-Zx81kQ"


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything starts a program."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a program was started: {args}")

    for name in ("system", "popen", "fork", "posix_spawn", "execv", "execve"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


def imported(
    inventory: Path, playbook: Path | None = None, *, compat: bool = False, **answers: str
) -> importing.Import:
    return importing.run(
        inventory, playbook, name="service", answers=Answers(answers), compat=compat
    )


def of_shape(directory: Path, shape: Shape, **options: Any) -> importing.Import:
    paths = files.write(directory, inventory=files.inventory(shape), playbook=files.playbook(shape))
    return imported(*paths, **options)


def problems(result: importing.Import) -> str:
    return "\n".join(f"{entry.what}: {entry.note}" for entry in result.report.of("problem"))


def deployment_of(directory: Path, result: importing.Import) -> Any:
    assert result.text is not None, report.written(result.report)
    path = directory / "service.yaml"
    path.write_text(result.text)
    return load(path)


def rendered(deployment: Any) -> dict[str, dict[str, str]]:
    """What each instance is given, read off its start script's variables and command: variables,
    flags as `--name`, vLLM's arguments as `extra --name`, and entries of JSON."""
    topology = placement.derive(deployment)
    engine = engines.get("omniinfer")
    facts = {
        name: HostFacts(entry.interface or "eth0", {}) for name, entry in deployment.hosts.items()
    }
    service = Service(
        deployment, topology, Layout.of(deployment, example.GENERATION), facts, deployment.image
    )
    tables = {}
    for instance in topology.instances:
        table = dict(engine.environment(service, instance.name))
        words = engine.command(service, instance.name)[2:] if instance.api_ports else []
        while words:
            name = words.pop(0)
            has_value = words and (name == "--extra-args" or not words[0].startswith("--"))
            value = words.pop(0) if has_value else ""
            if name == "--extra-args":
                table |= {f"--{a} ": v for a, v in _pairs(value)}
            elif name in ("--additional-config", "--kv-transfer-config"):
                table |= {f"{name} {key}": json.dumps(v) for key, v in json.loads(value).items()}
            else:
                table[name] = value
        tables[instance.name] = table
    return tables


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    yield from re.findall(r"--([\w-]+)(?:\s+((?!--)\S+))?", text)


class TestTheDocumentedService:
    @pytest.fixture
    def result(self) -> importing.Import:
        return imported(files.INVENTORY, files.PLAYBOOK, IMAGE=files.EARLY)

    def test_becomes_the_example(self, result: importing.Import) -> None:
        ours = yaml.safe_load((example.ROOT / "deployments" / "qwq-3p1d.yaml").read_text())
        theirs = yaml.safe_load(result.text or "")
        ours |= {"name": "service", "image": files.EARLY, "ssh": {"user": "root"}}
        ours["proxy"]["c0"].pop("port")  # the default
        assert theirs == ours

    def test_every_difference_from_what_the_playbook_renders_is_in_the_report(
        self, tmp_path: Path, result: importing.Import
    ) -> None:
        golden = json.loads((files.DATA.parent / "golden-3p1d.json").read_text())["engine"]
        text = report.written(result.report)
        for name, table in rendered(deployment_of(tmp_path, result)).items():
            upstream, said = (
                golden[name]["vllm_env"],
                " ".join(
                    entry.what
                    for entry in result.report.entries
                    if name in entry.what.split(":")[0]
                ),
            )
            made_by_launcher = {key for key in upstream if key.startswith("VLLM_DP_")}
            for key in (upstream.keys() | table.keys()) - made_by_launcher:
                if re.fullmatch(r"[A-Z_a-z]+", key) and upstream.get(key) != table.get(key):
                    is_place = key in ("SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
                    moved = is_place or "PATH" in key
                    assert key in said or (moved and key in text), (name, key)

    def test_each_line_is_accounted_for(self, result: importing.Import) -> None:
        lines = {(entry.place.file, entry.place.line) for entry in result.report.entries}
        for path in (files.INVENTORY, files.PLAYBOOK):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if _says_something(line):
                    assert (path.name, number) in lines, f"{path.name}:{number}: {line}"

    def test_compat_keeps_the_playbooks_values(self, tmp_path: Path) -> None:
        result = imported(files.INVENTORY, files.PLAYBOOK, IMAGE=files.EARLY, compat=True)
        deployment = deployment_of(tmp_path, result)
        golden = json.loads((files.DATA.parent / "golden-3p1d.json").read_text())["engine"]
        assert deployment.compat == "upstream"
        for name, table in rendered(deployment).items():
            assert table["--gpu-util"] == "0.88"
            assert table["--max-num-batched-tokens "] == "40960"
            assert table.get("HCCL_OP_EXPANSION_MOD") == golden[name]["vllm_env"].get(
                "HCCL_OP_EXPANSION_MOD"
            )


def _says_something(line: str) -> bool:
    """Whether a line of our data says something by itself, rather than open or close what does."""
    text = line.strip()
    structure = r"(all|vars|children|hosts|[PDC]|[pdc]\d|environment|tasks):|- hosts: all"
    shell_syntax = r"(else|fi|done|\)|}' \\|if .*; then|\{%.*%\}|\[\{\{.*|[\w\"]+=\"\$var\")"
    json_part = r"'\{|\"kv_.*"
    return bool(text) and not re.fullmatch(
        rf"#.*|{structure}|{shell_syntax}|{json_part}|- name: \w+|shell: .*|LOCAL_TABLE=.*merge.*",
        text,
    )


# Ways in which playbooks differ, each with what the instances are given then.
SHAPES: dict[str, tuple[Shape, dict[str, dict[str, str | None]]]] = {
    "pd_run": (
        Shape(),
        {
            "p0": {"HCCL_BUFFSIZE": "500", "VLLM_ENABLE_MC2": "1", "HCCL_EXEC_TIMEOUT": "120",
                   "--enable-mtp": "", "--gpu-util": "0.9", "--tp": "8", "--enforce-eager ": ""},
            "d0": {"HCCL_BUFFSIZE": "1000", "--max-num-seqs ": "32", "--served-model-name":
                   "deepseek", "--enforce-eager ": None, "--num-servers": "1"},
        },
    ),
    "pangu": (
        Shape(launcher="pd_run_pangu_ultra_moe.sh"),
        {"p0": {"--served-model-name": "pangu_ultra_moe"}},
    ),
    "decode of many copies over hosts": (
        Shape(decode_hosts=2, devices=16, decode_tp=1),
        {
            "p1": {"--tp": "16", "API_PORT": "9001"},
            "d0-0": {"--num-dp": "32", "--server-offset": "0", "API_PORT": "9100", "--tp": "1"},
            "d0-1": {"--num-dp": "32", "--num-servers": "16", "API_PORT": "9101"},
        },
    ),
    "prefills over hosts": (
        Shape(prefills=1, prefill_hosts=2, devices=16, decode_tp=16),
        {"p0-0-0": {"--tp": "32", "--distributed-executor-backend ": "ray", "NNODES": "2"}},
    ),
    "other ports": (
        Shape(port_bases=(11000, 13000, 7100), decode_offset=200, prefills=3),
        {
            "p2": {"MASTER_PORT": "11002", "API_PORT": "13002", "ZMQ_PORT": "7102"},
            "d0": {"MASTER_PORT": "11200", "API_PORT": "13200", "ZMQ_PORT": "7300"},
        },
    ),
    "ranks in tens": (
        Shape(rank_step=10, prefills=3),
        {
            "p1": {"MASTER_PORT": "8010", "API_PORT": "9010", "ZMQ_PORT": "5578"},
            "p2": {"MASTER_PORT": "8020", "API_PORT": "9020", "ZMQ_PORT": "5588"},
            "d0": {"MASTER_PORT": "8100", "API_PORT": "9100", "ZMQ_PORT": "5668"},
        },
    ),
    "JSON with blanks among the arguments": (
        Shape(extra_decode='--max-num-seqs 8 --compilation-config {"level": 3, "sizes": [1, 2]}'),
        {"d0": {"--compilation-config ": '{"level":3,"sizes":[1,2]}', "--max-num-seqs ": "8"}},
    ),
    "variables": (
        Shape(exports={"A": '"x y"', "B": "$A", "C": "${UNSET:-z}", "D": "'$A'"}),
        {"p0": {"A": "x y", "B": "x y", "C": "z", "D": "$A"}},
    ),
    "an early image": (
        Shape(image=files.EARLY),
        {"p0": {"--kv-transfer-config kv_parallel_size": "3"}},
    ),
    "a later image": (
        Shape(kv_parallel_size="${DECODE_TENSOR_PARALLEL_SIZE:-8}"),
        {"d0": {"--kv-transfer-config kv_parallel_size": "8"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
class TestShapes:
    def test_what_the_playbook_gives_is_rendered(self, tmp_path: Path, case: str) -> None:
        shape, expected = SHAPES[case]
        tables = rendered(deployment_of(tmp_path, of_shape(tmp_path, shape)))
        for name, values in expected.items():
            assert {key: tables[name].get(key) for key in values} == values, name

    def test_the_report_explains_each_difference(self, tmp_path: Path, case: str) -> None:
        result = of_shape(tmp_path, SHAPES[case][0])
        deployment_of(tmp_path, result)
        unexplained = [e for e in result.report.of("changed") if "pd-deploy's own" in e.note]
        assert unexplained == []
        assert result.report.of("problem", "unmapped", "not expressible") == []


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (Shape(batched=4096), "max-num-batched-tokens 4096 → 32768"),
        (
            Shape(additional='{"decode_gear_list": [8]}'),
            "additional_config.graph_model_compile_config.decode_gear_list none → [8]",
        ),
        (Shape(kv_parallel_size="1", decode_tp=8), "p0, p1, d0: kv_parallel_size 1 → 8"),
    ],
)
def test_what_a_rule_demands_otherwise_is_changed_and_said(
    tmp_path: Path, shape: Shape, says: str
) -> None:
    result = of_shape(tmp_path, shape)
    deployment_of(tmp_path, result)
    assert says in "\n".join(entry.what for entry in result.report.of("changed"))


@pytest.mark.parametrize(
    ("find", "replace", "says"),
    [
        ("AscendHcclConnectorV1", "LMCacheConnectorV1", "kv_connector LMCacheConnectorV1"),
        ("pd_run.sh", "start_api_servers_sgl.py", "the importer reads no commands of SGLang"),
        ("registry.example.com/omni/omniinfer:release_v0.6.0", "REPOSITORY:TAG", "--set IMAGE"),
        ("/data/models/m", "/path/to/model", "--set MODEL_PATH"),
        ("10.2.0.1", "decode.example.com", "expected an IPv4 address"),
        ("10.2.0.1", "127.0.0.1", "enter your hosts'"),
        ('"{{ base_api_port', "\"{{ lookup('pipe', 'id') + base_api_port", "the call of `lookup`"),
        ("--tp ${DECODE_TENSOR_PARALLEL_SIZE}", "--tp eight", "expected another value"),
        ("kv_rank: 1", "kv_rank: 0", "expected one host_ip per kv_rank"),
        ("run_vllm_server_decode_cmd", "run_decode", "the script that starts its servers"),
        ("    C:\n", "    X:\n", "expected a host for the proxy"),
    ],
)
def test_what_a_service_needs_is_asked_for(
    tmp_path: Path, find: str, replace: str, says: str
) -> None:
    shape = Shape()
    text = files.text_of(files.inventory(shape)).replace("'{{", '"{{').replace("}}'", '}}"')
    texts = {"inventory": text, "playbook": files.text_of(files.playbook(shape))}
    assert any(find in text for text in texts.values())
    changed = {name: text.replace(find, replace) for name, text in texts.items()}
    result = imported(*files.write(tmp_path, **changed))
    assert result.text is None
    assert says in problems(result)


def test_groups_that_pd_deploy_does_not_run_are_named(tmp_path: Path) -> None:
    document = files.inventory(Shape(), etcd_port=6000)
    hosts = document["all"]["children"]
    hosts["E"] = {"hosts": {"e0": {"ansible_host": "10.3.0.1"}}}
    paths = files.write(tmp_path, inventory=document, playbook=files.playbook(Shape()))
    result = imported(*paths)
    lost = "\n".join(f"{e.what} {e.note}" for e in result.report.of("not expressible"))
    assert result.text is not None
    assert all(name in lost for name in ("group E", "EPD", "etcd_port"))


def test_each_host_of_group_c_is_a_proxy(tmp_path: Path) -> None:
    document = files.inventory(Shape())
    proxies = document["all"]["children"]["C"]["hosts"]
    proxies["c1"] = {"ansible_host": "10.3.0.1", "node_port": 7001}
    paths = files.write(tmp_path, inventory=document, playbook=files.playbook(Shape()))
    result = imported(*paths)
    assert result.report.of("problem", "not expressible") == []
    assert "c1.node_port 7001" in {entry.what for entry in result.report.of("taken")}
    deployment = deployment_of(tmp_path, result)
    first, second = placement.build(deployment).proxies
    assert (second.name, second.server) == ("c1", "10.3.0.1:7001")
    assert second.entry.model_copy(update={"host": first.host, "port": first.port}) == first.entry


def test_an_inventory_of_ci_says_no_ranks(tmp_path: Path) -> None:
    document = files.inventory(Shape())
    for group in ("P", "D"):
        for host in document["all"]["children"][group]["hosts"].values():
            del host["host_ip"]
            host.pop("kv_rank", None)
            host["npu_server_list"] = host.pop("ascend_rt_visible_devices")
            for key in ("node_port", "api_port", "zmq_port"):
                del host[key]
    paths = files.write(tmp_path, inventory=document, playbook=files.playbook(Shape()))
    deployment = deployment_of(tmp_path, imported(*paths))
    assert list(deployment.prefill) == ["p0", "p1"]
    assert deployment.prefill["p0"].devices == tuple(range(8))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
)


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (BOMB, "values, aliases included"),
            ("x: &x [*x]\n", "alias"),
            ("[" * 5000, "levels of nesting"),
            ("- " * 100_000 + "x", "levels of nesting"),
            ("x: " + "y" * (1 << 20), "at most 1 MB"),
            ("[" + "1," * 60_000 + "1]", "values, aliases included"),
            ("a: [\n", "not valid YAML"),
            ("a: 1\n---\nb: 2\n", "one YAML document"),
            ("", "one YAML document"),
            ("? [a]\n: b\n", "simple key"),
            ("all: !!python/object/apply:os.system ['id']\n", "all.children"),
            ("x: 1\n", "all.children"),
        ],
    )
    def test_are_refused_with_one_error_that_names_the_line(
        self, tmp_path: Path, text: str, says: str
    ) -> None:
        (path,) = files.write(tmp_path, inventory=text)
        with pytest.raises(InvalidInput) as caught:
            imported(path, files.PLAYBOOK)
        (problem,) = caught.value.problems
        assert re.fullmatch(r"line \d+", problem.key)
        assert says in problem.message

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "inventory.yml"
        path.write_bytes(b"all:\n  \xff\xfe")
        with pytest.raises(InvalidInput, match="line 2: expected UTF-8"):
            imported(path, files.PLAYBOOK)
        with pytest.raises(InvalidInput, match="expected a file"):
            imported(tmp_path, files.PLAYBOOK)

    @pytest.mark.parametrize(
        "line",
        [
            "X=$(touch {marker})",
            "touch {marker}",
            "export X=`touch {marker}`",
            "if touch {marker}; then export Y=1; fi",
            "A=xxxxxxxxxx\n" + "A=$A$A$A$A\n" * 40,
            "{{{{ lookup('pipe', 'touch {marker}') }}}}",
            "f() {{ f | f & }}; f",
            "$(" * 3000,
            "if " * 5000,
            "<<X\n" * 2000,
            "for ((;;)); do touch {marker}; done",
        ],
    )
    def test_scripts_are_only_read(self, tmp_path: Path, line: str) -> None:
        marker = tmp_path / "marker"
        document = files.playbook(Shape())
        script = document[0]["vars"]["run_vllm_server_prefill_cmd"]
        first, rest = script.split("\n", 1)
        document[0]["vars"]["run_vllm_server_prefill_cmd"] = (
            f"{first}\n{line.format(marker=marker)}\n{rest}"
        )
        paths = files.write(tmp_path, inventory=files.inventory(Shape()), playbook=document)
        result = imported(*paths)
        assert result.report.entries
        assert not marker.exists()

    @pytest.mark.parametrize(
        "expression",
        [
            "{{ lookup('pipe', 'id') }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ 9 ** 9 ** 9 }}",
            "{{ 'x' * 1000000000 }}",
            "{{ range(999999999) | list }}",
            "{% for x in range(9) %}{% endfor %}",
            "{{ " + "(" * 900 + "1" + ")" * 900 + " }}",
            "{{ " + "-" * 3000 + "1 }}",
            "{{ " + "9" * 3900 + " }}",
            "{{ x }}" * 3000,
            "{{ a.b | map('x') }}",
        ],
    )
    def test_expressions_beyond_arithmetic_are_refused(self, expression: str) -> None:
        with pytest.raises(expressions.Refused):
            expressions.evaluate(expression, {"a": {}, "x": "y"})


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("A=1; B=$A", "1"),
        ("n=7\n((n++))\nB=$n", "8"),
        ("n=7\n((n--))\nB=$n", "6"),
        ('B=x\nfor i in 1 2; do B="$B $i"; done', None),
        ("B=x\nfor B in 1 2; do :; done", None),
        ("B=x\nwhile true; do B+=y; done", None),
        ("B=x\nf() { B=y; }; f", None),
        ("B=1\n((B+=2))", None),
        ("B=x\nread B", None),
        ("B=x\nif grep y z; then B=y; fi", None),
        ("B=x\nif grep y z; then for B in 1; do :; done; fi", None),
        ("B=x\nif [ 1 -eq 1 ]; then B=y; else B=z; fi", "y"),
        ("B=x\nif [ $(hostname) == y ]; then B=y; fi", None),
        ("B=$(hostname)", None),
        ('A=`id`; B="${A:-x}"', None),
        ("B=${A:-x}", "x"),
        ("unset A; B=$A", ""),
        ("B='$A'\"$A\"", "$A"),
        ("A=a,b; B=$(echo -n \"$A\" | tr -cd ',' | wc -c)", "1"),
        ("cat <<EOF\nB=y\nEOF\nB=x", "x"),
        ("B=x # B=y", "x"),
        ("B=a\\\nb", "ab"),
    ],
)
def test_a_variable_is_known_only_where_nothing_else_can_be(
    script: str, expected: str | None
) -> None:
    state = shell.Shell({})
    list(state.followed(shell.commands(script)))
    assert state.variables["B"] == expected


@given(st.text(alphabet="abAB=\"'$(){}`\\ \n;|&<>#\ue000\ue0011-", max_size=80))
def test_any_script_is_taken_apart(text: str) -> None:
    state = shell.Shell({"a": "b"})
    for statement in state.followed(shell.commands(text)):
        assert 1 <= statement.line <= statement.last_line
        if isinstance(statement, shell.Command):
            state.words(statement)


@given(st.recursive(
    st.integers(0, 9).map(str) | st.sampled_from(["base", "rank"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({' '.join(t)})"),
    max_leaves=8,
))  # fmt: skip
def test_arithmetic_is_evaluated_as_python_does(text: str) -> None:
    names = {"base": 90, "rank": 3}  # any eight of them are below the bound
    assert expressions.evaluate(f"{{{{ {text} }}}}", names) == eval(text, {}, names)


class TestSecrets:
    @pytest.fixture
    def result(self, tmp_path: Path) -> importing.Import:
        shape = Shape(exports={"HF_TOKEN": SECRET, "DB_PASSWORD": SECRET, "OK": "1"},
                      extra_prefill=f"--api-key {SECRET} --enforce-eager")  # fmt: skip
        inventory = files.inventory(shape, ansible_password=SECRET, my_secret=SECRET)
        inventory["all"]["children"]["P"]["hosts"]["p0"]["ansible_ssh_pass"] = SECRET
        inventory["all"]["children"]["P"]["hosts"]["p1"]["passwd"] = SECRET
        playbook = files.playbook(shape)
        playbook[0]["environment"]["HTTP_PROXY"] = f"http://me:{SECRET}@proxy:3128"
        playbook[0]["environment"]["REGISTRY_TOKEN"] = SECRET
        key = "run_vllm_server_decode_cmd"
        playbook[0]["vars"][key] = playbook[0]["vars"][key].replace(
            "cd /workspace",
            f"docker login -u me -p {SECRET} r\ncurl -u me:{SECRET} https://x\n"
            f"sshpass -p {SECRET} scp x y\nfrobnicate --password {SECRET}\n"
            f"export URL=https://me:{SECRET}@host/\ncd /workspace",
        )
        playbook[0]["vars"]["run_proxy_cmd"] += f"frob token={SECRET}\n"
        return imported(*files.write(tmp_path, inventory=inventory, playbook=playbook))

    def test_are_in_no_output(self, result: importing.Import) -> None:
        assert SECRET not in (result.text or "")
        assert SECRET not in report.written(result.report)

    def test_are_named_by_the_report(self, result: importing.Import) -> None:
        assert result.text is not None
        left_out = " ".join(entry.what for entry in result.report.of("secret"))
        for name in ("HF_TOKEN", "DB_PASSWORD", "api-key", "ansible_password", "my_secret",
                     "p0.ansible_ssh_pass", "p1.passwd", "HTTP_PROXY", "REGISTRY_TOKEN",
                     "URL"):  # fmt: skip
            assert name in left_out

    def test_encrypted_values_are_not_read(self, tmp_path: Path) -> None:
        text = yaml.safe_dump(files.inventory(Shape())).replace(
            "ansible_user: root",
            "ansible_user: root\n    ansible_become_password: !vault |\n      $ANSIBLE_VAULT;1.1\n"
            "      6161",
        )
        paths = files.write(tmp_path, inventory=text, playbook=files.playbook(Shape()))
        result = imported(*paths)
        assert "ansible_become_password" in [entry.what for entry in result.report.of("secret")]
        assert result.text is not None

    def test_names_of_sizes_are_none(self) -> None:
        assert not report.is_secret("max-num-batched-tokens", "4096")
        assert not report.is_secret("long-prefill-token-threshold", "32000")
        assert not report.is_secret("OMNI_SKIP_DECODE_TOKENIZE", "1")
        assert report.is_secret("ansible_password", "123456")


class TestCommand:
    def run(self, *words: object) -> Any:
        return CliRunner().invoke(main.app, ["import-ansible", *map(str, words)])

    def test_writes_a_file_that_check_accepts(self, tmp_path: Path) -> None:
        out, listed = tmp_path / "qwq.yaml", tmp_path / "report.txt"
        answer = f"IMAGE={files.EARLY}"
        result = self.run(files.INVENTORY, files.PLAYBOOK, "--set", answer, "-o", out, "--report",
                          listed)  # fmt: skip
        assert result.exit_code == 0
        assert re.fullmatch(
            rf"To look at: 1 secret, \d+ changed, .* \(see {listed}\)\n", result.stderr
        )
        assert result.stdout == f"wrote {out}. Next: pd-deploy check {out}\n"
        assert load(out).name == "qwq"
        assert listed.read_text().startswith("secret 1  changed")

    def test_prints_both_without_files(self) -> None:
        result = self.run(files.INVENTORY, files.PLAYBOOK, "--set", f"IMAGE={files.EARLY}")
        assert result.exit_code == 0
        assert "profile: qwq-32b-a3" in result.stdout
        assert "changed" in result.stderr

    def test_replaces_nothing_without_force(self, tmp_path: Path) -> None:
        out = tmp_path / "qwq.yaml"
        out.write_text("mine")
        words = (files.INVENTORY, files.PLAYBOOK, "--set", f"IMAGE={files.EARLY}", "-o", out)
        result = self.run(*words)
        assert isinstance(result.exception, InvalidInput)
        assert out.read_text() == "mine"
        assert self.run(*words, "--force").exit_code == 0
        assert out.read_text() != "mine"

    def test_says_what_is_missing_and_writes_nothing(self, tmp_path: Path) -> None:
        out = tmp_path / "qwq.yaml"
        result = self.run(files.INVENTORY, files.PLAYBOOK, "-o", out)
        assert result.exit_code == main.INVALID
        assert "give --set IMAGE=NAME:TAG" in result.stderr
        assert not out.exists()

    def test_says_so_too_where_the_report_is_in_a_file(self, tmp_path: Path) -> None:
        result = self.run(files.INVENTORY, files.PLAYBOOK, "--report", tmp_path / "report.txt")
        assert result.exit_code == main.INVALID
        assert len(result.stderr.splitlines()) == 2
        assert "give --set IMAGE=NAME:TAG" in result.stderr

    def test_strict_accepts_no_warnings(self, tmp_path: Path) -> None:
        out = tmp_path / "qwq.yaml"
        answer = f"IMAGE={files.EARLY}"
        result = self.run(files.INVENTORY, files.PLAYBOOK, "--set", answer, "--strict", "-o", out)
        assert result.exit_code == main.INVALID
        assert "with --strict" in result.stderr
        assert not out.exists()

    @pytest.mark.parametrize("setting", ["IMAGE", "=x", "NOBODY_ASKS=1"])
    def test_an_answer_to_nothing_is_refused(self, setting: str) -> None:
        answer = f"IMAGE={files.EARLY}"
        words = (files.INVENTORY, files.PLAYBOOK, "--set", answer, "--set", setting)
        assert isinstance(self.run(*words).exception, InvalidInput)

    def test_help_teaches(self) -> None:
        text = self.run("--help").stdout
        assert all(word in text for word in ("INVENTORY", "TEMPLATE", "--set", "Example:", "2"))


def test_crlf_reads_the_same(tmp_path: Path) -> None:
    texts = {"inventory": files.INVENTORY, "playbook": files.PLAYBOOK}
    for name, path in texts.items():
        (tmp_path / f"{name}.yml").write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    result = imported(tmp_path / "inventory.yml", tmp_path / "playbook.yml", IMAGE=files.EARLY)
    plain = imported(files.INVENTORY, files.PLAYBOOK, IMAGE=files.EARLY)
    assert yaml.safe_load(result.text or "") == yaml.safe_load(plain.text or "")


def test_a_file_of_the_lines_limit_is_read() -> None:
    assert documents.parse("x:\n" + "  - y\n" * 10_000, "a").at("x") is not None


PROFILES = {
    "small": Profile((1, 1, 8), (1, 1, 8), 8, mtp=False, kv_parallel_size=8),
    "prefill budgets below the length": Profile((4, 1, 16), (1, 4, 16), 1, 32000, 30000),
    "no budget": Profile((2, 1, 16), (1, 2, 16), 1, batched=None),
    "pods of many hosts": Profile((2, 2, 16), (1, 4, 16), 1, 163840, 163840),
    "eighteen prefills": Profile((18, 1, 16), (1, 18, 16), 1, 16384, 30000),
    "copies of several devices": Profile((8, 1, 16), (1, 4, 16), 4, kv_parallel_size=4),
    "the pods' number plus one": Profile(
        (2, 1, 8), (1, 4, 8), 1, kv_parallel_size="$((PREFILL_POD_NUM + 1))"
    ),
    "the connector of contract v1": Profile(
        (1, 1, 16),
        (1, 2, 16),
        1,
        connector="LLMDataDistConnector",
        image="registry.example.com/omni/omniinfer-a3-arm:release_1.2.1-202606292354-vllm",
    ),
    "ports that step by one": Profile((3, 1, 8), (1, 1, 8), 8, port_step=1, kv_parallel_size=8),
}


@cache
def of_profile(case: str) -> tuple[str, importing.Import]:
    """A profile's text, and what it gives; read once for all tests."""
    directory = Path(mkdtemp())
    paths = files.write(directory, profile=files.omni_cli(PROFILES[case]))
    return paths[0].read_text(), imported(*paths)


@pytest.mark.parametrize("case", PROFILES)
class TestOmniCli:
    def test_what_the_profile_gives_is_rendered(self, tmp_path: Path, case: str) -> None:
        profile = PROFILES[case]
        tables = rendered(deployment_of(tmp_path, of_profile(case)[1]))
        (pods, members, devices), (_, hosts, each) = profile.prefill, profile.decode
        assert len(tables) == pods * members + hosts
        first, *_, last = tables.values()
        assert profile.connector in first["--kv-transfer-config kv_connector"]
        assert first["--tp"] == str(members * devices)
        assert last["--tp"] == str(profile.decode_tp)
        assert last["--num-dp"] == str(hosts * each // profile.decode_tp)
        assert (first["--gpu-util"], last["--gpu-util"]) == ("0.92", "0.9")
        assert ("--enable-mtp" in first) == profile.mtp
        assert last["--compilation-config "] == '{"level":3}'
        assert (first["HCCL_BUFFSIZE"], last["HCCL_BUFFSIZE"]) == ("20", "1000")
        assert first["GLOO_SOCKET_IFNAME"] == "enp23s0f3"
        assert not any(key.startswith(("ATB_", "DEVICES")) for key in first)
        ports = ("MASTER_PORT", "API_PORT", "ZMQ_PORT")
        assert [first[name] for name in ports] == ["8000", "9000", "5568"]
        offset = 100 + profile.port_step * (hosts - 1)
        assert [last[name] for name in ports] == ["8100", f"{9000 + offset}", f"{5568 + offset}"]
        assert int(first.get("--max-num-batched-tokens ", 1 << 30)) >= profile.max_len

    def test_the_report_explains_each_difference(self, tmp_path: Path, case: str) -> None:
        _, result = of_profile(case)
        deployment_of(tmp_path, result)
        assert [e for e in result.report.of("changed") if "pd-deploy's own" in e.note] == []
        lost = {entry.what for entry in result.report.of("not expressible", "unmapped")}
        assert lost <= {"DEVICES"}

    def test_each_line_is_accounted_for(self, case: str) -> None:
        text, result = of_profile(case)
        lines = {entry.place.line for entry in result.report.entries}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.rstrip().endswith(":"):
                assert number in lines, f"{number}: {line}"


class TestRoles:
    @pytest.fixture
    def result(self, tmp_path: Path) -> importing.Import:
        document = files.inventory(Shape(devices=16, decode_hosts=2))
        for group in ("P", "D"):
            for host in document["all"]["children"][group]["hosts"].values():
                del host["zmq_port"]
        (path,) = files.write(tmp_path, inventory=document)
        return imported(path, files.ROLES)

    def test_what_the_playbook_gives_is_rendered(
        self, tmp_path: Path, result: importing.Import
    ) -> None:
        deployment = deployment_of(tmp_path, result)
        tables = rendered(deployment)
        assert deployment.contract == "roles"
        expected = {
            "p1": {"--tp": "16", "--max-model-len": "33792", "HCCL_BUFFSIZE": "20",
                   "--max-num-batched-tokens ": "33792", "--enable-mtp": None,
                   "VLLM_PLUGINS": "omni-npu,omni_npu_patches", "PYTHONHASHSEED": "123",
                   "--served-model-name": "deepseek-v3.2",
                   "--kv-transfer-config kv_connector": '"LLMDataDistConnector"'},
            "d0-1": {"--tp": "1", "--num-dp": "32", "HCCL_BUFFSIZE": "400", "--gpu-util": "0.9",
                     "--max-num-batched-tokens ": "256", "API_PORT": "9101",
                     "--additional-config enable_low_latency": "true",
                     "--compilation-config ": '{"cudagraph_mode":"FULL_DECODE_ONLY",'
                     '"cudagraph_capture_sizes":[4]}'},
        }  # fmt: skip
        for name, values in expected.items():
            assert {key: tables[name].get(key) for key in values} == values
        proxy = deployment.proxy["c0"]
        assert (proxy.log_level, proxy.core_num) == ("info", 8)
        assert proxy.arguments["omni-proxy-pd-policy"] == "sequential"
        assert [mount.source for mount in deployment.container.mounts][-1] == "/mnt"

    def test_the_report_explains_each_difference(
        self, tmp_path: Path, result: importing.Import
    ) -> None:
        deployment_of(tmp_path, result)
        assert [e for e in result.report.of("changed") if "pd-deploy's own" in e.note] == []
        assert [e.what for e in result.report.of("unmapped")] == []
        assert [e.what for e in result.report.of("not expressible")] == ["proc_bind_profile"]

    def test_each_line_is_accounted_for(self, result: importing.Import) -> None:
        lines = {e.place.line for e in result.report.entries if e.place.file == files.ROLES.name}
        for number, line in enumerate(files.ROLES.read_text().splitlines(), 1):
            opens = line.rstrip().endswith((":", ">-", "|-")) or line.lstrip().startswith("#")
            continues = line.startswith("          --") or line.strip().startswith('"')
            in_tasks = "import_role" in line or "name: common" in line
            in_profile = "host_sync" in line
            if not (opens or continues or in_tasks or in_profile):
                assert number in lines, f"{number}: {line}"

    @pytest.mark.parametrize(
        ("find", "replace", "says"),
        [
            ("deepseek-v3.2\n", "REPLACE_WITH_MODEL_NAME\n", "--set model="),
            ("--max-model-len 64000", "--max-model-len REPLACE_WITH_LEN", "a placeholder"),
            ("registry.example.com", "REPLACE_WITH_DOCKER", "--set IMAGE"),
            (
                "      runner: pd_run.sh",
                "      kv_connector: Other",
                "expected one that a contract",
            ),
        ],
    )
    def test_what_is_missing_is_asked_for(
        self, tmp_path: Path, find: str, replace: str, says: str
    ) -> None:
        text = files.ROLES.read_text()
        assert find in text
        shape = Shape(devices=16)
        paths = files.write(
            tmp_path, inventory=files.inventory(shape), playbook=text.replace(find, replace)
        )
        result = imported(*paths)
        assert result.text is None
        assert says in problems(result)

    def test_several_decode_pods_are_possible(self, tmp_path: Path) -> None:
        document = files.inventory(Shape(devices=16, decode_hosts=2))
        hosts = document["all"]["children"]["D"].pop("hosts")
        hosts["d1"]["host_ip"] = hosts["d1"]["ansible_host"]
        document["all"]["children"]["D"]["children"] = {
            f"D{index}": {"hosts": {name: host}} for index, (name, host) in enumerate(hosts.items())
        }
        (path,) = files.write(tmp_path, inventory=document)
        deployment = deployment_of(tmp_path, imported(path, files.ROLES))
        assert list(deployment.decode) == ["d0", "d1"]


def test_answers_are_what_ansible_gets_by_e(tmp_path: Path) -> None:
    document = files.playbook(Shape())
    document[0]["environment"]["MODEL_PATH"] = "{{ model_dir | default('/data') }}/m2"
    paths = files.write(tmp_path, inventory=files.inventory(Shape()), playbook=document)
    plain = deployment_of(tmp_path, imported(*paths))
    answers = Answers({"model_dir": "/mnt", "base_api_port": "9500"})
    result = importing.run(*paths, name="service", answers=answers)
    answered = deployment_of(tmp_path, result)
    assert (plain.model.path, answered.model.path) == ("/data/m2", "/mnt/m2")
    assert (plain.ports.api, answered.ports.api) == (9000, 9500)
    assert answers.used == {"model_dir", "base_api_port"}


def test_hosts_with_logins_of_their_own_keep_them(tmp_path: Path) -> None:
    document = files.inventory(Shape())
    document["all"]["children"]["D"]["hosts"]["d0"] |= {"ansible_user": "me", "ansible_port": 2222}
    paths = files.write(tmp_path, inventory=document, playbook=files.playbook(Shape()))
    deployment = deployment_of(tmp_path, imported(*paths))
    assert deployment.ssh.user == "root"
    logins = [entry.ssh for entry in deployment.hosts.values() if entry.ssh]
    assert [(login.user, login.port) for login in logins] == [("me", 2222)]


def test_a_profile_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    paths = files.write(
        tmp_path, inventory=files.inventory(Shape()), playbook=files.playbook(Shape())
    )
    for profile in ("vllm-gpu", "qwq-32b-a3", "none"):
        with pytest.raises(InvalidInput, match="profile"):
            importing.run(*paths, name="service", answers=Answers(), profile=profile)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (files.EARLY, "v0-early, by its tag"),
        (files.IMAGE, "v0, by its tag"),
        ("registry.example.com/omni/x:mine", "v0, assumed: the tag does not tell"),
    ],
)
def test_the_file_says_which_age_it_is_for_and_why(tmp_path: Path, image: str, says: str) -> None:
    result = of_shape(tmp_path, Shape(image=image))
    assert f"# The image's contract: {says}" in (result.text or "")
    assert ("assumed" in says) == any(e.what == "image" for e in result.report.of("changed"))


def _paths(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _paths(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from _paths(value, (*path, index))


def _with(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[path[0]] = _with(document[path[0]], path[1:], value)
    return changed


SMALL = Shape(prefills=1)
DOCUMENTS = (
    {"inventory": files.inventory(SMALL), "playbook": files.playbook(SMALL)},
    {"inventory": files.inventory(SMALL), "playbook": yaml.safe_load(files.ROLES.read_text())},
    {"inventory": files.omni_cli(Profile((1, 1, 8), (1, 1, 8), 8))},
)


@settings(max_examples=40)
@given(st.data())
def test_any_other_value_anywhere_is_imported_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    documents = data.draw(st.sampled_from(DOCUMENTS))
    name = data.draw(st.sampled_from(sorted(documents)))
    path = data.draw(st.sampled_from(list(_paths(documents[name]))))
    other: list[Any] = [None, [], {}, "x", 5, [1], {"a": {"b": 1}}, True, "{{ x }}", "$(id)", "'",
                        "-1", 10**30]  # fmt: skip
    value = data.draw(st.sampled_from(other))
    changed = {**documents, name: _with(documents[name], path, value)}
    paths = files.write(tmp_path_factory.mktemp("files"), **changed)
    try:
        result = imported(*paths)
    except InvalidInput:
        return
    assert (result.text is None) == bool(result.report.of("problem"))
