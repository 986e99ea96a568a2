"""The options of `vllm bench serve` in vLLM 0.9.0, as far as the stand-in has them.

One request is always sent first; each request is always in the result; the temperature is 0.
"""

import argparse


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument("--endpoint-type", default="openai-comp", choices=["openai-comp"])
    parser.add_argument("--base-url")
    parser.add_argument("--endpoint", default="/v1/completions")
    parser.add_argument("--dataset-name", default="random", choices=["random"])
    parser.add_argument("--max-concurrency", type=int)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.add_argument("--save-result", action="store_true")
    parser.add_argument("--result-dir")
    parser.add_argument("--result-filename")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--percentile-metrics", default="ttft,tpot,itl")
    parser.add_argument("--metric-percentiles", default="99")
    parser.add_argument("--random-input-len", type=int, default=1024)
    parser.add_argument("--random-output-len", type=int, default=128)
