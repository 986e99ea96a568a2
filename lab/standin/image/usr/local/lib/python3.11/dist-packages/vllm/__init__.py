"""The one part of vLLM that the stand-in has as a package: what `vllm bench serve` takes."""
