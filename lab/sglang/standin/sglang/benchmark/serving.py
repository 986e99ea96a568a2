"""`python3 -m sglang.bench_serving`, with the options of 0.5.23 as far as the stand-in has them."""

import argparse
import json
import sys
from pathlib import Path

from sglang.benchmark import load

WARM_UP_TOKENS = 32


def cli_main() -> None:
    """Send a load and write the result; exit code 2 for a wrong command line, 1 for a failure."""
    parser = argparse.ArgumentParser(description="Benchmark the online serving throughput.")
    parser.add_argument("--backend", default="sglang", choices=["sglang", "sglang-oai", "vllm"])
    parser.add_argument("--base-url")
    parser.add_argument("--ready-check-timeout-sec", type=int, default=60)
    parser.add_argument(
        "--dataset-name", default="sharegpt", choices=["sharegpt", "random", "random-ids"]
    )
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--tokenizer")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--random-input-len", type=int, default=1024)
    parser.add_argument("--random-output-len", type=int, default=1024)
    parser.add_argument("--random-range-ratio", type=float, default=0.0)
    parser.add_argument("--max-concurrency", type=int)
    parser.add_argument("--output-file")
    parser.add_argument("--output-details", action="store_true")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--warmup-requests", type=int, default=1)
    args = parser.parse_args()
    if args.dataset_name != "random-ids":
        sys.exit("requests.exceptions.ConnectionError: huggingface.co is out of reach")
    if args.backend == "sglang":
        sys.exit("the stand-in's router knows no /generate")
    if args.random_range_ratio != 1.0:
        sys.exit("the stand-in makes prompts of one length only")
    if args.ready_check_timeout_sec:
        sys.exit(f"Server at {args.base_url}/v1/models is not ready. Exiting.")
    load.require_tokenizer(args.tokenizer or args.model)
    texts = load.prompts(args.num_prompts, args.random_input_len, args.seed)
    bodies = [body(args, text, args.random_output_len) for text in texts]
    url = f"{args.base_url}/v1/completions"
    warm_up = body(args, texts[0], min(args.random_output_len, WARM_UP_TOKENS))
    tests = [load.ask(url, warm_up, args.random_input_len) for _ in range(args.warmup_requests)]
    if tests and all(test.error for test in tests):
        raise ValueError(
            "Warmup failed - Please make sure benchmark arguments are correctly specified. "
            f"Error: {tests[0].error}"
        )
    at_once = args.max_concurrency or args.num_prompts
    outputs, seconds = load.carried(url, bodies, args.random_input_len, at_once)
    result = {
        "backend": args.backend,
        "dataset_name": args.dataset_name,
        "max_concurrency": args.max_concurrency,
        **load.summed_up(outputs, seconds),
    }
    with Path(args.output_file or "result.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def body(args: argparse.Namespace, prompt: str, tokens: int) -> dict:
    """Build a request."""
    return {
        "model": args.served_model_name or args.model,
        "prompt": prompt,
        "temperature": 0.0,
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
    }
