"""`vllm bench serve`: its options are those of the image's age."""

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from standin import load


def main(argv: list[str]) -> None:
    """Send a load and write the result; exit code 2 for a wrong command line, 1 for a failure."""
    from vllm.benchmarks.serve import add_cli_args

    parser = argparse.ArgumentParser(prog="vllm bench serve", allow_abbrev=False)
    add_cli_args(parser)
    options = parser.parse_args(argv)
    load.require_tokenizer(options.tokenizer or options.model)
    texts = load.prompts(options.num_prompts, options.random_input_len, options.seed)
    url = f"{options.base_url}{options.endpoint}"
    bodies = [body(options, text) for text in texts]
    # Later versions send none first unless they are told to wait for the server.
    if getattr(options, "ready_check_timeout_sec", 1):
        print("Starting initial single prompt test run...", flush=True)
        test = load.ask(url, bodies[0], options.random_input_len)
        if test.error:
            raise ValueError(
                "Initial test run failed - Please make sure benchmark arguments are correctly "
                f"specified. Error: {test.error}"
            )
    at_once = options.max_concurrency or options.num_prompts
    outputs, seconds = load.carried(url, bodies, options.random_input_len, at_once)
    summed = load.summed_up(outputs, seconds)
    print(f"Successful requests: {summed['completed']}", flush=True)
    if options.save_result:
        place = Path(options.result_dir or ".", options.result_filename or "result.json")
        place.write_text(json.dumps(result(options, summed, outputs)))


def body(options: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """Build a request."""
    temperature = getattr(options, "temperature", 0.0)
    return {
        "model": options.model,
        "prompt": prompt,
        **({} if temperature is None else {"temperature": temperature}),
        "repetition_penalty": 1.0,
        "max_tokens": options.random_output_len,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if options.ignore_eos else {}),
    }


def result(
    options: argparse.Namespace, summed: dict[str, Any], outputs: list[load.Output]
) -> dict[str, Any]:
    """Return what is written; later versions leave each request out unless they are asked for it."""
    detailed = getattr(options, "save_detailed", True)
    left_out = {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": getattr(options, "endpoint_type", "openai"),
        "label": None,
        "model_id": options.model,
        "tokenizer_id": options.tokenizer,
        "num_prompts": options.num_prompts,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": options.max_concurrency,
        **{key: value for key, value in summed.items() if detailed or key not in left_out},
    }
