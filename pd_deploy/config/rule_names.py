"""The names of the rules that a service has to keep. Pure; they are applied in
`pd_deploy.planning.rules` and in the engines."""

RULES = {
    "batched-tokens": "`max-num-batched-tokens` holds the longest prompt",
    "decode-devices": "decode with several copies of the model has devices 0, 1, … on each host",
    "decode-gear-list": "graph sizes stand inside `graph_model_compile_config`, at most 6",
    "derived-arguments": "what follows from the topology is not given as an argument",
    "derived-environment": "what follows from the topology is not given as a variable",
    "device-ids": "device ids are those of the hardware",
    "devices-disjoint": "a device belongs to one instance",
    "engine-keys": "keys that the engine has no use for are not given",
    "equal-devices": "a pod has as many devices on each of its hosts",
    "host-addresses": "hosts have addresses of their own",
    "kv-parallel-size": "`kv_parallel_size` is what an image of its age reads",
    "mount-targets": "mounts keep off the paths that pd-deploy mounts itself",
    "multi-host-decode": "decode spans hosts only where the profile supports it",
    "multi-host-prefill": "a prefill spans hosts only where the profile supports it",
    "one-decode-pod": "there is one decode pod",
    "ports-distinct": "a port of a host has one user",
    "ports-in-range": "ports fit into 65535, prefill's below decode's",
    "prefill-pods": "there are at most 32 prefill pods; the proxy chooses no others",
    "prefill-sizes": "all prefill pods have the same number of devices",
    "tensor-parallel": "tensor parallel size and devices agree",
    "tensor-parallel-ratio": "tensor parallel sizes of prefill and decode divide each other",
    "values-without-blanks": "arguments have no blanks; the launcher splits at them",
}
"""Name → what the rule demands."""
