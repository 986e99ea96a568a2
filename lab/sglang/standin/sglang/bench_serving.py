"""The former name of `sglang.benchmark.serving`, which still works."""

from sglang.benchmark.serving import cli_main

if __name__ == "__main__":
    cli_main()
