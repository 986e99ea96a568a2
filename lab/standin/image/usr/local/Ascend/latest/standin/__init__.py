"""Stand-in for the omni-infer engine: follows the deployment contract, needs no NPU."""
