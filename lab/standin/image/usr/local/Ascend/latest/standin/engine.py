"""One request through the engine: where its KV comes from, what it generates."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from standin import age, model, ondemand
from standin.decode import DecodeSide, PullFailed
from standin.environment import Environment
from standin.faults import Faults
from standin.instance import Instance
from standin.kvstore import KvStore
from standin.metrics import Metrics
from standin.scheduler import Scheduler


@dataclass(frozen=True)
class Request:
    """What a client asks for, checked."""

    request_id: str
    prompt_ids: list[int]
    max_tokens: int
    ignore_eos: bool = False
    kv_params: dict[str, Any] | None = None


@dataclass
class Generation:
    """An answer in progress: iterate `texts`; the rest is known at once."""

    texts: Iterator[str]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    kv_params: dict[str, Any] | None = field(default=None)


class Engine:
    """Prefill computes KV and keeps it; decode fetches it, or computes it when none is offered."""

    def __init__(
        self,
        options: argparse.Namespace,
        env: Environment,
        instance: Instance,
        faults: Faults,
        metrics: Metrics,
    ) -> None:
        self.store = KvStore(metrics, instance.release_seconds)
        side = DecodeSide if age.contract() == "v0" else ondemand.DecodeSide
        self.decode = None if instance.is_prefill else side(instance, metrics)
        self._instance = instance
        self._faults = faults
        self._metrics = metrics
        self._reuse_first_token = env.switch("OMNI_REUSE_PREFILLED_TOKENS")
        self._skip_tokenize = env.switch("OMNI_SKIP_DECODE_TOKENIZE")
        unlimited = env.switch("FORCE_ENABLE_CHUNK_PREFILL")
        if age.contract() != "v0":  # chunked prefill is its default
            unlimited = not options.no_enable_chunked_prefill
        budget = 0 if unlimited else options.max_num_batched_tokens
        self._scheduler = Scheduler(budget, options.max_num_seqs, metrics)

    @contextmanager
    def generation(
        self, request: Request, client_gone: Callable[[], bool]
    ) -> Iterator[Generation]:
        """Schedule a request and generate its answer.

        Raises:
            PullFailed: the KV it was promised could not be had.
            ClientGone: the client hung up before it was scheduled.
        """
        external = self.decode is not None and request.kv_params is not None
        external = external and not self._faults.now()["ignore_kv"]
        with self._scheduler.admitted(1 if external else len(request.prompt_ids), client_gone):
            transferred = self._transferred(request) if external else None
            external = transferred is not None
            prompt_ids, kv, first = transferred or (
                request.prompt_ids, model.kv_of(request.prompt_ids), None
            )
            self._count_prompt(len(prompt_ids), external)
            output = model.Output(prompt_ids, kv, request.ignore_eos)
            yield self._answer(request, prompt_ids, kv, output, first)

    def _transferred(self, request: Request) -> tuple[list[int], bytes, int | None] | None:
        """Return prompt, KV and first token; None if the prompt has to be computed instead."""
        try:
            return self._pull(request)
        except PullFailed as problem:
            self._metrics.add("standin:kv_transfer_errors_total")
            if not self._instance.recomputes:
                raise
            print(f"WARNING KV pull failed, computing the prompt: {problem}", flush=True)
            return None

    def _pull(self, request: Request) -> tuple[list[int], bytes, int | None]:
        offered = request.kv_params
        prompt_ids, first = request.prompt_ids, None
        try:
            if self._skip_tokenize:
                prompt_ids = offered["prompt_token_ids"]
            if self._reuse_first_token:
                first = offered["prefilled_token"]
            cluster_id, blocks = offered["remote_cluster_id"], offered["remote_block_ids"]
            release_address = offered["remote_host_ip"]
        except KeyError as missing:
            raise PullFailed(f"kv_transfer_params has no {missing}") from None
        kv = self.decode.pull(cluster_id, blocks, release_address)
        if kv != model.kv_of(prompt_ids):
            raise PullFailed(f"the KV of cluster {cluster_id} blocks {blocks} is of another prompt")
        self.decode.release(release_address, request.request_id)
        if self.decode.reads_other_heads(cluster_id) or self._faults.now()["other_heads"]:
            kv = model.other_heads(kv)
        return prompt_ids, kv, first

    def _count_prompt(self, tokens: int, external: bool) -> None:
        self._metrics.add("vllm:prompt_tokens_total", tokens)
        if self.decode is not None:
            source = "external_kv_transfer" if external else "local_compute"
            self._metrics.add("vllm:prompt_tokens_by_source_total", tokens, source=source)
            self._metrics.add("standin:requests_by_source_total", source=source)

    def _answer(
        self, request: Request, prompt_ids: list[int], kv: bytes, output: model.Output,
        first: int | None,
    ) -> Generation:
        count = min(request.max_tokens, output.length)
        reason = "length" if request.max_tokens <= output.length else "stop"
        self._metrics.add("vllm:generation_tokens_total", count)
        self._metrics.add("vllm:request_success_total", finished_reason=reason)
        answer = Generation(self._texts(output, count, first), len(prompt_ids), count, reason)
        # Prefill offers KV only when its answer was cut by length (5.4).
        if self._instance.is_prefill and reason == "length":
            answer.kv_params = self._offer(request, kv, output, prompt_ids)
        return answer

    def _texts(self, output: model.Output, count: int, first: int | None) -> Iterator[str]:
        for position in range(count):
            time.sleep(self._faults.now()["token_seconds"])
            reused = position == 0 and first is not None
            yield output.text(first if reused else output.token(position))

    def _offer(
        self, request: Request, kv: bytes, output: model.Output, prompt_ids: list[int]
    ) -> dict[str, Any]:
        server_ip, port = self._instance.server.server_ip, self._instance.zmq_port
        offer: dict[str, Any] = {
            "remote_block_ids": self.store.keep(request.request_id, kv, len(prompt_ids)),
            "remote_cluster_id": self._instance.cluster_id,
            "remote_host_ip": f"tcp://{server_ip}:{port}",
            "spec_token_ids": [],
        }
        if self._skip_tokenize:
            offer["prompt_token_ids"] = prompt_ids
        if self._reuse_first_token:
            offer["prefilled_token"] = output.token(0)
        return offer
