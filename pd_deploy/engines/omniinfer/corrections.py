"""What pd-deploy does otherwise than upstream's playbook, and why. The one list of it.

`compat: upstream` undoes the corrections of values: those of the engine here, by name, and those
of a profile by the profile's own `upstream` section. The others are ways of doing the same thing
(most show in no value that the engine sees); they stay.
"""

from dataclasses import dataclass
from typing import Literal

from pd_deploy.config.models import Deployment


@dataclass(frozen=True)
class Correction:
    """One deliberate difference. `untried`: the engine sees it, and no hardware has yet."""

    name: str
    where: Literal["engine", "profile", "always"]
    upstream: str
    ours: str
    why: str
    untried: bool = False


CORRECTIONS = (
    Correction(
        "hccl-interface",
        "engine",
        "`HCCL_SOCKET_IFNAME` is not set",
        "set, like GLOO's and TP's, to the interface that owns the host's address",
        "HCCL may choose another interface than the rest",
        untried=True,
    ),
    Correction(
        "fixed-ports",
        "engine",
        "a taken API port makes the server drift to the next one",
        "`--max-port-attempts 1`",
        "the proxy's list would name a port where nothing listens",
    ),
    Correction(
        "unbuffered-log",
        "engine",
        "Python's output is buffered",
        "`PYTHONUNBUFFERED=1`",
        "the log shows what happens when it happens",
    ),
    Correction(
        "no-shared-tmp",
        "engine",
        "`/tmp` of the host is mounted",
        "it is not",
        "nothing of ours lies there, and others clean it",
    ),
    Correction(
        "proxy-environment",
        "engine",
        "the proxy's script is given HOST, the balancers and empty proxy variables",
        "only the variables that are used",
        "its arguments say the same",
    ),
    Correction(
        "engine-ids",
        "profile",
        "QwQ's decode has `engine_id` 0, which is p0's",
        "`engine_id` is the pod's `kv_rank` (`decode_engine_id`), as in the default template",
        "connectors that use it need it unique",
        untried=True,
    ),
    Correction(
        "batched-tokens",
        "profile",
        "`max-num-batched-tokens` 40960 for prompts of 61244",
        "at least the model length",
        "a longer prompt is accepted, never scheduled, and blocks all behind it; with "
        "prefill-memory it is what upstream has later, see there",
        untried=True,
    ),
    Correction(
        "prefill-memory",
        "profile",
        "`gpu_memory_utilization` 0.88 on prefill",
        "0.65",
        "upstream has 0.65 for 61440 tokens in its later profiles, for later images, together with "
        "`ENABLE_PREFILL_TND=1`, `TASK_QUEUE_ENABLE=2`, `AUTO_USE_UC_MEMORY=1` and "
        "`PYTORCH_NPU_ALLOC_CONF=expandable_segments:True` (as in `qwq-32b-a2`); without these "
        "four the pair is untried",
        untried=True,
    ),
    Correction(
        "expansion-mode",
        "profile",
        "`HCCL_OP_EXPANSION_MOD`, which nothing reads",
        "`HCCL_OP_EXPANSION_MODE`",
        "the name that HCCL reads; AIV now applies on decode",
        untried=True,
    ),
    Correction(
        "gear-list",
        "profile",
        "`decode_gear_list` beside `graph_model_compile_config`",
        "inside it",
        "it is read only there",
        untried=True,
    ),
    Correction(
        "launch-blocking",
        "profile",
        "DeepSeek-R1's decode has `ASCEND_LAUNCH_BLOCKING=1`",
        "0",
        "1 runs kernels one at a time; it is a debugging aid",
        untried=True,
    ),
    Correction(
        "main-process",
        "always",
        "the server is started with `docker exec -d` in a container that runs bash on a terminal",
        "the server is its container's main process, with an init, stopped by SIGINT",
        "exit code, log and stop mean what they say",
    ),
    Correction(
        "generations",
        "always",
        "scripts, ranktables and logs of all deployments share directories that are wiped as root",
        "one directory per deployment and generation; nothing is wiped",
        "two deployments, or two instances of a host, destroy each other's files",
    ),
    Correction(
        "central-ranktables",
        "always",
        "each container writes its part, named after what its hostname resolves to; parts are "
        "found again by patterns",
        "built in one place from the hosts' addresses in the file and what `hccn_tool` says",
        "parts get lost or mixed up, with exit code 0",
    ),
    Correction(
        "exact-ranktables",
        "always",
        "an instance's ranktable is the first match of a pattern that other devices match too",
        "the exact path",
        "the wrong file, or none, without a word",
    ),
    Correction(
        "interface-of-address",
        "always",
        "the interface is that of the default route",
        "the one that owns the host's address; `hosts.<name>.interface` overrides it",
        "the default route may use another network, or not exist",
        untried=True,
    ),
    Correction(
        "one-order",
        "always",
        "decode's addresses are master first, its offsets and ranktable in the file's order; a "
        "prefill's host that does not follow its master is dropped",
        "one order everywhere: the master, then the other hosts",
        "ranks and addresses disagree",
    ),
    Correction(
        "pods",
        "always",
        "pods are counted by address, decode's by instance, and overridden by 1",
        "pods are what the file says; a second decode pod is refused where there are ranktables",
        "two prefills on a host count as one, two decodes are merged into one",
    ),
    Correction(
        "ray-join",
        "always",
        "fixed pauses of 5 and 10 s; a join loop that never ends",
        "a host joins as soon as the master listens, the master starts when all have joined, "
        "both bounded",
        "too short or too long; a missing host holds the devices for ever",
        untried=True,
    ),
    Correction(
        "ray-address",
        "always",
        "ray and the engine choose their address by the default route",
        "ray is started with the host's address, and `VLLM_HOST_IP` is the same",
        "the engine asks ray for the node of its own address and must find it",
        untried=True,
    ),
    Correction(
        "kv-parallel-size",
        "always",
        "the templates followed the engine's new meaning of `kv_parallel_size` six weeks late",
        "by the image's age; refused where the tag tells none, or where the file says otherwise",
        "with the other meaning's number decode answers garbage, without an error",
        untried=True,
    ),
    Correction(
        "launcher-port",
        "always",
        "the launcher refuses a port with connections in TIME_WAIT, for 60 s after the last one",
        "it runs with SO_REUSEADDR set on what it binds, as the server does; a port that is "
        "listened on is still refused",
        "a restart fails for a minute after a probe or an idle connection that the server closed",
        untried=True,
    ),
    Correction(
        "extra-arguments",
        "always",
        "`--extra-args` in the order of the template",
        "in the order of profile and file",
        "they are options by name; their order means nothing",
    ),
    Correction(
        "log-rotation",
        "always",
        "the containers' logs grow without bound",
        "Docker keeps the last 3 files of 100 MB of each",
        "a full disk stops all that runs on the host",
    ),
    Correction(
        "read-only-mounts",
        "always",
        "the time zone and the directories of scripts and ranktables may be written in containers",
        "`/etc/localtime` and the generation's directory are mounted read-only",
        "a container can't change what the next start reads",
    ),
    Correction(
        "nginx-sources",
        "always",
        "nginx is built in every proxy container, its sources fetched from nginx.org unless there",
        "built only if the image has none, from `nginx_tarball` on the host or from nginx.org, by "
        "HTTPS; sources with another digest than `nginx_sha256`, and a failure, end the stage",
        "hosts often have no way out, a failed build was seen by nobody, and root runs what came",
    ),
    Correction(
        "proxy-options",
        "always",
        "the balancer's slots are 16 and 32 and requests are logged into the container",
        "where the image's script knows the options: the roles' `max-num-seqs`, and the log "
        "directory",
        "the balancer counts other slots than the servers have",
        untried=True,
    ),
    Correction(
        "pass-through",
        "always",
        "omni_proxy of `roles` relays `/proxy/ADDRESS:PORT/…` to that address for anybody",
        "it answers 403, unless the file says `pass_through: true`",
        "whoever reaches the proxy's port would reach all that its host reaches",
    ),
    Correction(
        "omni-proxy-limits",
        "always",
        "omni_proxy's numbers of sequences and tokens are given by hand, beside the engine's",
        "they are the engine's own",
        "it would reckon with other limits than the servers have",
        untried=True,
    ),
    Correction(
        "both-names",
        "always",
        "variables that were renamed are given by one of their names",
        "by both, for `v1` and `roles`",
        "which name is read differs from build to build, and some readers don't fall back",
        untried=True,
    ),
    Correction(
        "failed-transfers",
        "always",
        "decode computes a prompt again whose KV did not arrive",
        "its request fails (`kv_load_failure_policy`), for `v1` and `roles`",
        "a broken transfer would show as slow answers only",
        untried=True,
    ),
    Correction(
        "start-order",
        "always",
        "fixed pauses of 20 or 45 s, chosen by the first host for all",
        "a pod starts when those it follows have started",
        "too short or too long",
        untried=True,
    ),
    Correction(
        "proxy-last",
        "always",
        "the proxy serves before its backends do",
        "its port opens when all of them are ready",
        "requests fail, and skew the balancer's counters for good",
    ),
)

_OF_ENGINE = {c.name for c in CORRECTIONS if c.where == "engine"}


def corrected(deployment: Deployment, name: str) -> bool:
    """Tell whether a correction of the engine's values applies.

    Raises:
        KeyError: the list has no such correction.
    """
    if name not in _OF_ENGINE:
        raise KeyError(name)
    return deployment.compat != "upstream"


def as_markdown() -> str:
    """Write the list as a page of the documentation."""
    titles = {
        "engine": "Values, by the engine",
        "profile": "Values, by profiles",
        "always": "Ways of doing it",
    }
    after = {
        "engine": "Undone by `compat: upstream`.",
        "profile": "Undone by `compat: upstream` where the profile has a section `upstream`.",
        "always": "They always apply. Where one shows in a value that the engine is given, it says "
        "so.",
    }
    lines = [
        "# Corrections",
        "",
        "What pd-deploy does otherwise than upstream's playbook. Made from "
        "`pd_deploy/engines/omniinfer/corrections.py`.",
        "⚠ marks what the engine sees and what has not been tried on hardware.",
    ]
    for where, title in titles.items():
        lines += ["", f"## {title}", "", after[where], ""]
        lines += ["| name | upstream | pd-deploy | why |", "|---|---|---|---|"]
        lines += [
            f"| {c.name}{' ⚠' if c.untried else ''} | {c.upstream} | {c.ours} | {c.why} |"
            for c in CORRECTIONS
            if c.where == where
        ]
    return "\n".join(lines) + "\n"
