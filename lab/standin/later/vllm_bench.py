"""The options of `vllm bench serve` in later versions of vLLM, as far as the stand-in has them."""

import argparse


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument("--backend", default="openai", choices=["vllm", "openai", "openai-chat"])
    parser.add_argument("--base-url")
    parser.add_argument("--endpoint", default="/v1/completions")
    parser.add_argument("--dataset-name", default="random", choices=["random", "sharegpt", "hf"])
    parser.add_argument("--max-concurrency", type=int)
    parser.add_argument("--model")
    parser.add_argument("--tokenizer")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--num-warmups", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.add_argument("--save-result", action="store_true")
    parser.add_argument("--save-detailed", action="store_true")
    parser.add_argument("--result-dir")
    parser.add_argument("--result-filename")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--percentile-metrics")
    parser.add_argument("--metric-percentiles", default="99")
    parser.add_argument("--ready-check-timeout-sec", type=int, default=0)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--random-input-len", type=int, default=1024)
    parser.add_argument("--random-output-len", type=int, default=128)
