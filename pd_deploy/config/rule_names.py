"""The names of the rules that a service has to keep. Pure; they are applied in
`pd_deploy.planning.rules` and in the engines."""

RULES = {
    "batched-tokens": "`max-num-batched-tokens` holds the longest prompt",
    "benchmark-length": "prompt and answer of `gates.benchmark` fit the longest sequence",
    "code-commit": "`code` is based on the commit that the image has by what it says of itself",
    "code-path": "`code` has a place in the containers where the engine looks for it",
    "contract-of-image": "`contract` is the one that the image follows by what it says of itself",
    "decode-devices": "decode with several copies of the model has devices 0, 1, … on each host",
    "decode-gear-list": "graph sizes are inside `graph_model_compile_config`, at most 6",
    "derived-arguments": "what follows from the topology is not given as an argument",
    "derived-environment": "what follows from the topology is not given as a variable",
    "device-ids": "device ids are those of the hardware",
    "devices-disjoint": "a device belongs to only one instance",
    "engine-keys": "keys that the engine doesn't use are not given",
    "equal-devices": "a pod has the same number of devices on each of its hosts",
    "host-addresses": "no two hosts have the same address",
    "image-options": "SGLang's server in the image takes each of the arguments",
    "kv-layout": "prefill's and decode's KV have pages of one size, and one type",
    "kv-parallel-size": "`kv_parallel_size` fits the image's age",
    "mount-targets": "mounts don't cover the paths that pd-deploy mounts itself",
    "multi-host-decode": "decode spans hosts only where the profile supports it",
    "multi-host-prefill": "a prefill spans hosts only where the profile supports it",
    "one-decode-pod": "there is one decode pod, where the engine reads ranktables",
    "no-key-in-file": "no API key is in the file",
    "paths-apart": "state and logs are in different directories",
    "ports-distinct": "no two users of a host have the same port",
    "ports-in-range": "ports are at most 65535, prefill's below decode's",
    "prefill-pods": "there are at most 32 prefill pods, because the proxy never chooses others",
    "prefill-sizes": "all prefill pods have the same number of devices",
    "prefix-aware": "prefix-aware routing has omni_proxy, and prefills that cache prefixes",
    "proxy-program": "the image's contract has the proxy's program",
    "recompute-scheduler": "decode doesn't end answers half-way to be computed again, because "
    "vllm-router doesn't send them to prefill again",
    "tensor-parallel": "tensor parallel size and number of devices fit",
    "tensor-parallel-ratio": "prefill's and decode's tensor parallel sizes divide one another",
    "transfer-backend": "KV's transfer backend is one of the device",
    "values-without-blanks": "arguments have no spaces, because the launcher splits at them",
}
"""Name → what the rule demands."""

CHECKS = {
    "clock": "clocks differ by 2 s at most",
    "cpu-governor": "processors go faster under load",
    "device-addresses": "devices have the addresses that /etc/hccn.conf gives them",
    "device-gateway": "devices have a gateway, where those of other hosts are in other networks",
    "device-health": "devices that are going to be used are in order",
    "device-link": "their network ports are up",
    "device-network": "they reach the address that they probe",
    "device-ping": "they reach the devices of other hosts",
    "device-tls": "all devices encrypt what they send, or none does",
    "driver-version": "all hosts have the same driver, and have loaded it",
    "firmware-version": "all hosts have the same firmware",
    "host": "the host answers, and has what its part of the service needs",
    "huge-pages": "at most half of the memory is kept for huge pages",
    "image-architecture": "the image is for the hosts' processors",
    "memory": "a tenth of the memory is free",
    "model-files": "the model's directory is the same on all hosts",
    "mtu": "the hosts' interfaces have the same MTU",
    "not-read": "what tools print is understood",
    "ports-reachable": "hosts reach each other's ports",
    "shared-memory": "nothing large is left in /dev/shm",
}
"""Name → what a check of hosts demands."""

ALLOWABLE = (
    "device-health",
    "device-link",
    "device-ping",
    "device-tls",
    "model-files",
    "ports-reachable",
)
"""Checks whose errors a file may allow; they are warnings then."""
