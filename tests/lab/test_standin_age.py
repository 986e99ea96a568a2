"""What the stand-in does differently by the date of its image, or of a source tree in its place:
the meaning of kv_parallel_size, the options of launcher and proxy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pd_deploy.lab import contracts
from pd_deploy.lab.standin.processes import (
    PYTHON,
    STANDIN,
    Instance,
    StandinSet,
    hand_over,
    standin_set,
)
from tests.lab.proxies import fill_root, run_proxy, set_age

PROMPT = {"model": "qwen", "max_tokens": 20, "prompt": "how are you?"}
NUMBERS = PROMPT | {"prompt": "5, 7, 9, 11,", "max_tokens": 5}
BEFORE, SINCE = "2025-08-12", "2025-08-13"


def text_of(prefill: Instance, decode: Instance, body: dict[str, Any]) -> str:
    answer = hand_over(prefill, decode, body)
    assert answer.status == 200, answer.text
    return str(answer.body["choices"][0]["text"])


def words(text: str) -> list[str]:
    return text.replace(",", " ,").split()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinSet]:
    """A 1P1D set of a new image with kv_parallel_size = prefill pods + 1; it serves."""
    directory = tmp_path_factory.mktemp("wrong")
    with standin_set(directory, prefills=1, built=SINCE) as instances:
        instances.start()
        instances.wait_ready()
        yield instances


@pytest.fixture
def new(tmp_path: Path) -> Iterator[StandinSet]:
    """A 1P1D set of a new image that is not started."""
    with standin_set(tmp_path, prefills=1, built=SINCE) as instances:
        yield instances


def test_the_image_is_of_the_day_of_its_tag() -> None:
    file = STANDIN / "image/usr/local/Ascend/latest/standin/built"
    assert file.read_text() == "2025-07-22\n"


@pytest.mark.parametrize("value", [1, 8])
def test_old_images_want_the_prefill_pods_and_one(tmp_path: Path, value: int) -> None:
    with standin_set(tmp_path, prefills=1, built=BEFORE) as instances:
        for name in ("p0", "d0"):
            instances[name].kv["kv_parallel_size"] = value
            instances[name].start()
            assert instances[name].exit_code() == 0
            log = instances[name].log()
            assert f"refused [kv-parallel-size, contract 1.4]: {RULE}" in log
            assert f"expected 2 in code of {BEFORE}, found {value}" in log


RULE = "kv_parallel_size is not the number of prefill pods + 1"


def test_new_images_are_right_with_the_tensor_parallel_size_of_decode(new: StandinSet) -> None:
    for name in ("p0", "d0"):
        new[name].kv["kv_parallel_size"] = 8
    new.start()
    new.wait_ready()
    right = new["d0"].request("/v1/completions", PROMPT).body["choices"][0]["text"]
    assert text_of(new["p0"], new["d0"], PROMPT) == right
    assert text_of(new["p0"], new["d0"], NUMBERS) == " 13, 15, 17"


def test_in_new_images_a_wrong_value_looks_well(wrong: StandinSet) -> None:
    prefill, decode = wrong["p0"], wrong["d0"]
    source = 'standin:requests_by_source_total{source="external_kv_transfer"}'
    errors = "standin:kv_transfer_errors_total"
    before = decode.metric(source), decode.metric(errors)
    held = prefill.metric("standin:kv_blocks_held")
    text_of(prefill, decode, PROMPT)
    for instance in (prefill, decode):
        assert instance.metric("standin:links") == 1
        assert instance.request("/health").status == 200
    assert (decode.metric(source), decode.metric(errors)) == (before[0] + 1, before[1])
    assert decode.metric('standin:kv_transfers_total{cluster_id="0"}') >= 1
    prefill.wait_for_metric("standin:kv_blocks_held", held)


@pytest.mark.parametrize("body", [PROMPT, NUMBERS])
def test_in_new_images_a_wrong_value_gives_garbage_after_the_first_token(
    wrong: StandinSet, body: dict[str, Any]
) -> None:
    right = wrong["d0"].request("/v1/completions", body).body["choices"][0]["text"]
    found = text_of(wrong["p0"], wrong["d0"], body)
    assert words(found)[0] == words(right)[0]
    assert words(found)[1] != words(right)[1]


def test_new_images_still_find_kv_of_another_prompt(wrong: StandinSet) -> None:
    first = wrong["p0"].request("/v1/completions", PROMPT | {"max_tokens": 1}).body
    params = first["kv_transfer_params"] | {"prompt_token_ids": [1, 2]}
    answer = wrong["d0"].request("/v1/completions", PROMPT | {"kv_transfer_params": params})
    assert answer.status == 500
    assert "is of another prompt" in answer.body["message"]


@pytest.mark.parametrize("name", ["p0", "d0"])
def test_in_new_images_one_wrong_side_is_enough(new: StandinSet, name: str) -> None:
    for instance in ("p0", "d0"):
        new[instance].kv["kv_parallel_size"] = 2 if instance == name else 8
    new.start()
    new.wait_ready()
    right = new["d0"].request("/v1/completions", NUMBERS).body["choices"][0]["text"]
    assert text_of(new["p0"], new["d0"], NUMBERS) != right


def test_without_reused_tokens_the_garbage_begins_with_the_first(new: StandinSet) -> None:
    for name in ("p0", "d0"):
        new[name].env["OMNI_REUSE_PREFILLED_TOKENS"] = "0"
    new.start()
    new.wait_ready()
    assert words(text_of(new["p0"], new["d0"], NUMBERS))[0] != "13"


def test_a_date_that_is_none_is_refused(tmp_path: Path) -> None:
    with standin_set(tmp_path, prefills=1, built="July") as instances:
        instances["p0"].start()
        assert instances["p0"].exit_code() == 1
        assert "refused [built, contract -]" in instances["p0"].launcher_log()


# A source tree of another age than the image's, as somebody may mount it


EARLY, LATE = "2025-07-22", "2026-03-26"
NEWER_OPTION = ["--load-format", "auto"]


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The sources of a contract's image, beside the stand-in's engine."""
    directory = tmp_path / "other"
    tree = directory / "workspace/omniinfer"
    for path, content in contracts.sources(request.param).items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content.encode() if isinstance(content, str) else content or b"")
    (directory / "usr").symlink_to(STANDIN / "image/usr")
    return tree


def runs(instance: Instance, tree: Path) -> None:
    """Let an instance run the code of a tree."""
    instance.launcher = [PYTHON, "-S", str(tree / "tools/scripts/start_api_servers.py")]
    instance.env["PYTHONPATH"] = str(tree)


early = pytest.mark.parametrize("tree", ["v0-early"], indirect=True)
late = pytest.mark.parametrize("tree", ["v0"], indirect=True)


@early
def test_an_older_tree_in_a_newer_image_takes_what_was_taken_then(
    tmp_path: Path, tree: Path
) -> None:
    with standin_set(tmp_path / "set", prefills=1, built=LATE) as instances:
        prefill = instances["p0"]
        runs(prefill, tree)
        prefill.kv["kv_parallel_size"] = 8
        prefill.start()
        assert prefill.exit_code() == 0
        assert f"expected 2 in code of {EARLY}, found 8" in prefill.log()
        prefill.extra += NEWER_OPTION
        prefill.start()
        assert prefill.exit_code() == 2
        assert "unrecognized arguments: --load-format" in prefill.launcher_log()


@late
def test_a_newer_tree_in_an_older_image_takes_what_is_taken_now(tmp_path: Path, tree: Path) -> None:
    with standin_set(tmp_path / "set", prefills=1, built=EARLY) as instances:
        prefill = instances["p0"]
        runs(prefill, tree)
        prefill.kv["kv_parallel_size"] = 8
        prefill.extra += NEWER_OPTION
        prefill.start()
        prefill.wait_for(lambda: "Starting to load model" in prefill.log(), "load")
        assert "omni 0.7.1 from" in prefill.log()


@pytest.mark.parametrize(
    ("tree", "image", "code"), [("v0-early", LATE, 1), ("v0", EARLY, 0)], indirect=["tree"]
)
def test_the_proxy_of_a_tree_takes_the_options_of_its_age(
    tmp_path: Path, tree: Path, image: str, code: int
) -> None:
    root = tmp_path / "root"
    fill_root(root)
    set_age(root, image)
    script = tree / "omni/accelerators/sched/global_proxy/global_proxy.sh"
    lists = ["--prefill-servers-list", "10.0.0.1:9000", "--decode-servers-list", "10.0.0.2:9100"]
    done = run_proxy(script, root, "--dry-run", *lists, "--access-log-file", "/x")
    assert done.returncode == code, done.stderr
