"""The load generators that engines bring, and how they are asked. Pure, but for the source of what
runs them, which is read when this is imported.

An option that only some ages of a generator have is passed on where its own source, in the image,
has it; all others are those that every age has. Prompts are of random tokens, others with each
seed, so no prefix cache helps. Before it measures, a generator sends one request that does not
count.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pd_deploy.config.models import Benchmark
from pd_deploy.config.topology import Topology
from pd_deploy.engines.load_in_container import MARK, PLACE
from pd_deploy.engines.python import in_python

KEY_VARIABLE = "OPENAI_API_KEY"
"""By which generators are given the key of a service."""
_SOURCE = resources.files(__package__).joinpath("load_in_container.py").read_text()
_RESULT = "result.json"
_TRUST = "trust-remote-code"
_READY_S = 5  # the proxy answers: the smoke test has passed


@dataclass(frozen=True)
class Asked:
    """A run of a load generator.

    Attributes:
        model: its served name; `tokenizer` is the model's directory.
        load: what is to be sent; of several proxies each gets a share.
    """

    url: str
    model: str
    tokenizer: str
    load: Benchmark
    seed: int


@dataclass(frozen=True)
class LoadGenerator:
    """A load generator that an engine's image has.

    Attributes:
        name: what figures call it; those of two names are never compared.
        command: what runs it, once ~/.bashrc has been read.
        package: where it comes from, and the `sources` in it of which one has its options.
        arguments: writes those that all ages of it take.
        if_known: alternatives of options; the first that its source has is passed on.
    """

    name: str
    command: tuple[str, ...]
    package: str
    sources: tuple[str, ...]
    arguments: Callable[[Asked], Sequence[str]]
    if_known: tuple[tuple[tuple[str, ...], ...], ...] = ()

    def look_in_container(self) -> list[str]:
        """Return the command that looks for it in a container, and prints whether it is there."""
        return in_python(_SOURCE, json.dumps(self._place()))

    def in_container(self, asked: Asked) -> list[str]:
        """Return the command that runs it in a container, and prints what it found."""
        told = {
            **self._place(),
            "arguments": list(self.arguments(asked)),
            "if_known": self.if_known,
            "seconds": asked.load.seconds,
            "result": _RESULT,
        }
        return in_python(_SOURCE, json.dumps(told))

    def _place(self) -> dict[str, Any]:
        return {"command": self.command, "package": self.package, "sources": self.sources}


class Answer(BaseModel):
    """What became of a run of a load generator in a container.

    Attributes:
        missing: why it could not be run; empty if it was.
        late: whether its time was over before it had ended.
        said: what it printed last.
        result: what it wrote; None if it wrote nothing.
    """

    model_config = ConfigDict(frozen=True)

    missing: str = ""
    version: str = ""
    late: bool = False
    code: int = 0
    said: str = ""
    result: dict[str, Any] | None = None


def parse(output: str) -> Answer:
    """Parse what the command in the container printed.

    Raises:
        ValueError: it is no answer; says what it is instead.
    """
    answers = [line for line in output.splitlines() if line.startswith(MARK)]
    try:
        return Answer.model_validate_json(answers[-1].removeprefix(MARK))
    except (IndexError, ValidationError):
        raise ValueError(output.strip()[-1000:] or "no output") from None


def vllm_bench(program: str, *, trusts_code: bool = False) -> LoadGenerator:
    """Return vLLM's load generator, `vllm bench serve`, which it has since 0.8.5.

    Args:
        program: the command `vllm`.
        trusts_code: whether its tokenizer may run code that lies beside the model.
    """

    def arguments(asked: Asked) -> list[str]:
        load = asked.load
        return [
            "--base-url", asked.url,
            "--model", asked.model,
            "--tokenizer", asked.tokenizer,
            *([f"--{_TRUST}"] if trusts_code else []),
            "--dataset-name", "random",
            "--random-input-len", str(load.input_length),
            "--random-output-len", str(load.output_length),
            "--ignore-eos",
            "--num-prompts", str(load.requests),
            "--max-concurrency", str(load.concurrency),
            "--seed", str(asked.seed),
            "--disable-tqdm",
            "--save-result",
            "--result-dir", PLACE,
            "--result-filename", _RESULT,
        ]  # fmt: skip

    return LoadGenerator(
        name="vllm bench",
        command=(program, "bench", "serve"),
        package="vllm",
        sources=("benchmarks/serve.py",),
        arguments=arguments,
        if_known=(
            # Before it had the option, each request was in the result anyhow.
            (("--save-detailed",),),
            # Before it had the option, it was 0; later the server's default is, without it.
            (("--temperature", "0"),),
            # Before it had the option, it always sent one request first; later none without it.
            (("--ready-check-timeout-sec", str(_READY_S)),),
        ),
    )


def sglang_bench(python: str) -> LoadGenerator:
    """Return SGLang's load generator, `python3 -m sglang.bench_serving`.

    It is asked for random ids, as it would get texts for `random` from the internet, and for whole
    lengths: by itself it takes any from one token on.
    """

    def arguments(asked: Asked) -> list[str]:
        load = asked.load
        return [
            "--backend", "sglang-oai",
            "--base-url", asked.url,
            "--model", asked.model,
            "--tokenizer", asked.tokenizer,
            "--dataset-name", "random-ids",
            "--random-input-len", str(load.input_length),
            "--random-output-len", str(load.output_length),
            "--random-range-ratio", "1.0",
            "--num-prompts", str(load.requests),
            "--max-concurrency", str(load.concurrency),
            "--seed", str(asked.seed),
            "--disable-tqdm",
            "--output-details",
            "--output-file", f"{PLACE}/{_RESULT}",
        ]  # fmt: skip

    return LoadGenerator(
        name="sglang bench",
        command=(python, "-m", "sglang.bench_serving"),
        package="sglang",
        # Since 0.5.x the first only leads to the second.
        sources=("benchmark/serving.py", "bench_serving.py"),
        arguments=arguments,
        # Where it has the option, it would wait for /v1/models, which not all routers have.
        if_known=((("--ready-check-timeout-sec", "0"),),),
    )


def trusts_code(topology: Topology) -> bool:
    """Tell whether a deployment's servers may run code that lies beside the model."""
    named = (pod.master.settings.arguments for pod in topology.pods)
    return any(given.get(_TRUST) or given.get(_TRUST.replace("-", "_")) for given in named)
