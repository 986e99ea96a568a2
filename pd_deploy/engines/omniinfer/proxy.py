"""omni-infer's proxies, global_proxy and omni_proxy: scripts, arguments and environment. Pure."""

import shlex
from collections.abc import Iterable, Sequence

from pd_deploy.config.fields import Scalar
from pd_deploy.config.models import Deployment
from pd_deploy.config.topology import Pod, Proxy
from pd_deploy.engines.base import PROVING_ADDRESS, MetricsPage, Service
from pd_deploy.engines.common import (
    ONE_STEP_ON,
    code_setup,
    exports,
    flags,
    secrets,
    text,
    title,
)
from pd_deploy.engines.omniinfer.contracts import contract_of
from pd_deploy.engines.omniinfer.corrections import corrected
from pd_deploy.engines.omniinfer.environment import (
    HASH_SEED,
    SOURCES_OF_MODULES,
    code,
    code_place,
    is_prefix_aware,
)

PREPARED = "pd-deploy: proxy prepared"
OPEN = "pd-deploy: proxy open"
PROVING = f"{OPEN} to the smoke test"
OPENED = f"{OPEN} to clients"
_NGINX = "nginx-1.24.0"
_HEALTH_S = 10  # omni_proxy asks every server before it answers


def script(service: Service, proxy: Proxy) -> str:
    """Write the script of the proxy's container. It prepares nginx, tests its configuration, and
    waits to be opened to the smoke test alone, then to clients. It ends when nginx does; stopping
    it drains nginx."""
    write = _omni_script if _is_omni(service.deployment) else _global_script
    return write(service, proxy)


def command(service: Service, proxy: Proxy) -> list[str]:
    """Return the arguments of the image's script that writes nginx's configuration."""
    write = _omni_command if _is_omni(service.deployment) else _global_command
    return write(service, proxy)


def environment(service: Service, proxy: Proxy) -> dict[str, str]:
    """Return what the script exports: where an image without nginx finds its sources, how prompts
    are hashed, and what the file gives."""
    in_file = proxy.entry.environment
    own = {} if _is_omni(service.deployment) else _build_environment(service, proxy)
    if is_prefix_aware(service.deployment):
        own["PYTHONHASHSEED"] = HASH_SEED
    return own | {key: text(value) for key, value in in_file.items()}


def metrics(deployment: Deployment, proxy: Proxy) -> MetricsPage | None:
    """Return omni_proxy's page; global_proxy has none."""
    page = MetricsPage(proxy.server, "/omni_proxy/metrics")
    return page if _is_omni(deployment) else None


def shares_port(proxy: Proxy, _start_script: str) -> bool:
    """Tell whether nginx listens with `reuseport`: both scripts have it so (contract section 5.3),
    unless omni_proxy's is told otherwise."""
    return not any(name.replace("_", "-") == "no-reuseport" for name in proxy.entry.arguments)


def _is_omni(deployment: Deployment) -> bool:
    return contract_of(deployment).program(deployment) == "omni"


def _directories(service: Service) -> list[str]:
    """List where the program's script may be, as words of a shell."""
    contract, tree = contract_of(service.deployment), shlex.quote(code(service.deployment))
    places = contract.proxies.get(contract.program(service.deployment), ())
    return [f"{tree}/omniinfer/{place}" for place in places]


def _logs_and_cores(service: Service, proxy: Proxy) -> list[str]:
    """Write the options that both proxies' scripts have for their log and their cores."""
    entry = proxy.entry
    return [
        "--log-file", f"{_logs(service, proxy)}/nginx_error.log",
        "--log-level", entry.log_level,
        "--core-num", str(entry.core_num),
        "--start-core-index", str(entry.start_core_index),
    ]  # fmt: skip


def _global_command(service: Service, proxy: Proxy) -> list[str]:
    """Write the command of global_proxy (contract section 5.1)."""
    topology, entry = service.topology, proxy.entry
    return [
        "bash", "global_proxy.sh",
        "--listen-port", str(proxy.port),
        "--prefill-servers-list", ",".join(_servers(topology.prefill)),
        "--decode-servers-list", ",".join(_servers(topology.decode)),
        *_logs_and_cores(service, proxy),
        "--prefill-lb-sdk", entry.prefill_lb_sdk,
        "--decode-lb-sdk", entry.decode_lb_sdk,
        *flags(entry.arguments),
    ]  # fmt: skip


def _omni_command(service: Service, proxy: Proxy) -> list[str]:
    """Write the command of omni_proxy (contract section 9.5), with the engine's own limits, which
    it reckons with when it chooses servers."""
    topology, entry = service.topology, proxy.entry
    tuning: dict[str, Scalar | None] = {
        "access-log-file": f"{_logs(service, proxy)}/nginx_access.log",
        "omni-proxy-pd-policy": "sequential",
        "omni-proxy-max-batch-num-token": _largest(topology.prefill, "max-num-batched-tokens"),
        "omni-proxy-prefill-max-num-seqs": _largest(topology.prefill, "max-num-seqs"),
        "omni-proxy-decode-max-num-seqs": _largest(topology.decode, "max-num-seqs"),
        # Prompts are compared by their tokens, so the proxy needs the tokenizer.
        "omni-proxy-model-path": service.deployment.model.path if entry.prefix_aware else None,
    }
    in_file = {name.replace("_", "-"): value for name, value in entry.arguments.items()}
    return [
        "bash", "omni_proxy.sh",
        "--listen-port", str(proxy.port),
        "--prefill-endpoints", ",".join(_servers(topology.prefill)),
        "--decode-endpoints", ",".join(_servers(topology.decode)),
        *_logs_and_cores(service, proxy),
        *flags({k: v for k, v in tuning.items() if v is not None} | in_file),
    ]  # fmt: skip


def _if_known_to_the_image(service: Service, proxy: Proxy) -> str:
    """Write the options that only later images' scripts have: the batch sizes of both sides, by
    which `pd_score_balance` counts free slots (16 and 32 unless given), and where requests are
    logged. An older script ends at an option that it does not know, so each is tried first.
    """
    options: dict[str, Scalar | None] = {
        "prefill-max-num-seqs": _largest(service.topology.prefill, "max-num-seqs"),
        "decode-max-num-seqs": _largest(service.topology.decode, "max-num-seqs"),
        "access-log-file": f"{_logs(service, proxy)}/nginx_access.log",
    }
    in_file = {argument.replace("_", "-") for argument in proxy.entry.arguments}
    lines = ['takes() { "${proxy[@]}" "$@" --dry-run >/dev/null 2>&1 && proxy+=("$@"); }']
    lines += [
        shlex.join(["takes", f"--{option}", text(value)])
        for option, value in options.items()
        if value is not None and option not in in_file
    ]
    return "\n".join(lines)


def _largest(pods: Sequence[Pod], argument: str) -> int | None:
    """Return the largest number that pods have for an argument; None if none of them gives one."""
    numbers = [
        int(value)
        for pod in pods
        for name, value in pod.master.settings.arguments.items()
        if name.replace("_", "-") == argument and str(value).isdecimal()
    ]
    return max(numbers, default=None)


def _servers(pods: Iterable[Pod]) -> list[str]:
    return [server for pod in pods for server in pod.servers]


def _logs(service: Service, proxy: Proxy) -> str:
    return service.layout.log_directory(proxy.name)


def _build_environment(service: Service, proxy: Proxy) -> dict[str, str]:
    url = service.deployment.http_proxy
    if corrected(service.deployment, "proxy-environment"):
        return {"http_proxy": url, "https_proxy": url} if url else {}
    return {
        "http_proxy": url or "",
        "https_proxy": url or "",
        "HOST": proxy.name,
        "PREFILL_LB_SDK": proxy.entry.prefill_lb_sdk,
        "DECODE_LB_SDK": proxy.entry.decode_lb_sdk,
    }


def _global_script(service: Service, proxy: Proxy) -> str:
    port = proxy.port
    return f"""\
#!/bin/bash
{title(service, proxy.name)}
{secrets(service)}{exports(environment(service, proxy))}
trap 'exit 0' INT TERM
{code_setup(code_place(service.deployment), installs=False)}\
export PATH="$PATH:/usr/local/nginx:/usr/sbin"
if ! command -v nginx >/dev/null; then
    echo "pd-deploy: the image has no nginx; building {_NGINX}"
    cd {shlex.quote(code(service.deployment))}/omniinfer/{SOURCES_OF_MODULES} || exit 1
{fetch_nginx(proxy)}
{BUILD_NGINX}fi
unset http_proxy https_proxy
cd {" ".join(_directories(service)[:1])} || exit 1
proxy=({shlex.join(_global_command(service, proxy))})
{_if_known_to_the_image(service, proxy)}
"${{proxy[@]}}" --dry-run || exit 1
conf=/usr/local/nginx/conf/nginx.conf
sed -E "s|listen +{port}[^;]*;|listen {PROVING_ADDRESS}:{port};|" $conf >$conf.proving
nginx -t -c $conf.proving || exit 1
{ONE_STEP_ON}
echo {shlex.quote(PREPARED)}
one_step_on
# The balancer's counts outlive a reload, so clients get an nginx of their own.
nginx -c $conf.proving || exit 1
proving=$(pgrep -o -x nginx) || exit 1
echo {shlex.quote(PROVING)}
one_step_on
kill -QUIT "$proving"
tail -s 0.05 --pid="$proving" -f /dev/null
"${{proxy[@]}}" || exit 1
master=$(pgrep -o -x nginx) || exit 1
{_STOPPED_BY}echo {shlex.quote(OPENED)}
{_UNTIL_STOPPED}"""


def _omni_script(service: Service, proxy: Proxy) -> str:
    """Write omni_proxy's script. Clients are served from the configuration that was tested, because
    the image's script would write it again, with its pass-through location open."""
    port, closed = proxy.port, "" if proxy.entry.pass_through else _CLOSED
    listen = rf"listen +([^;]*:)?{port}( [^;]*)?;"
    proving = shlex.quote(f"s#{listen}#listen {PROVING_ADDRESS}:{port};{closed}#")
    clients = shlex.quote(f"s#{listen}#&{closed}#")
    return f"""\
#!/bin/bash
{title(service, proxy.name)}
{secrets(service)}{exports(environment(service, proxy))}
trap 'exit 0' INT TERM
{code_setup(code_place(service.deployment), installs=False)}\
export PATH="$PATH:/usr/local/nginx:/usr/sbin"
command -v nginx >/dev/null || {{ echo "pd-deploy: the image has no nginx"; exit 1; }}
for directory in {" ".join(_directories(service))}; do
    [ ! -r "$directory/omni_proxy.sh" ] || break
done
cd "$directory" && [ -r omni_proxy.sh ] || {{ echo "pd-deploy: no omni_proxy.sh"; exit 1; }}
proxy=({shlex.join(_omni_command(service, proxy))})
"${{proxy[@]}}" --dry-run || exit 1
conf=/usr/local/nginx/conf/nginx.conf
sed -E {clients} $conf >$conf.clients && nginx -t -c $conf.clients || exit 1
sed -E {proving} $conf >$conf.proving && nginx -t -c $conf.proving || exit 1
grep -q 'listen {PROVING_ADDRESS}:' $conf.proving || {{
    echo "pd-deploy: expected omni_proxy to listen on {port}, found no such line in $conf"
    exit 1
}}
healthy() {{
    exec 3<>/dev/tcp/"$1"/{port} || return
    printf 'GET /omni_proxy/health HTTP/1.0\\r\\n\\r\\n' >&3
    read -r -t {_HEALTH_S} _ status _ <&3
    exec 3>&-
    # Before 2025-10-22 it has no such page.
    [ "$status" = 200 ] || [ "$status" = 404 ]
}} 2>/dev/null
until_healthy() {{
    until healthy "$1"; do
        kill -0 "$2" 2>/dev/null || {{ echo "pd-deploy: nginx ended"; exit 1; }}
        sleep 0.2
    done
}}
{ONE_STEP_ON}
echo {shlex.quote(PREPARED)}
one_step_on
# The proxy's counts outlive a reload, so clients get an nginx of their own.
nginx -c $conf.proving || exit 1
proving=$(pgrep -o -x nginx) || exit 1
until_healthy {PROVING_ADDRESS} "$proving"
echo {shlex.quote(PROVING)}
one_step_on
kill -QUIT "$proving"
tail -s 0.05 --pid="$proving" -f /dev/null
nginx -c $conf.clients || exit 1
master=$(pgrep -o -x nginx) || exit 1
{_STOPPED_BY}until_healthy 127.0.0.1 "$master"
echo {shlex.quote(OPENED)}
{_UNTIL_STOPPED}"""


_STOPPED_BY = """\
trap 'stopped=1; kill -QUIT "$master"; kill "$waiter"' INT TERM
"""
_UNTIL_STOPPED = """\
tail --pid="$master" -f /dev/null & waiter=$!
while kill -0 "$waiter"; do wait "$waiter"; done 2>/dev/null
[ -n "$stopped" ] || { echo "pd-deploy: nginx ended"; exit 1; }
# The one above looks once a second, and clients wait until the next proxy has the port.
tail -s 0.05 --pid="$master" -f /dev/null
"""
# omni_proxy relays /proxy/ADDRESS:PORT/… to that address for anybody. What stands here, beside
# `listen`, is decided before any location is looked for.
_CLOSED = " if ($uri ~* ^/proxy/) { return 403; }"
# Build scripts differ in the version that they take unless they are told one.
BUILD_NGINX = f"""\
    export NGINX_VERSION={_NGINX.removeprefix("nginx-")}
    tar xzf {_NGINX}.tar.gz && bash build.sh || {{ echo "pd-deploy: nginx was not built"; exit 1; }}
"""


def fetch_nginx(proxy: Proxy) -> str:
    """Write how the sources get there: from the host or nginx.org, and no others than expected."""
    entry, tarball = proxy.entry, f"{_NGINX}.tar.gz"
    fetch = f"curl -fsS -o {tarball} https://nginx.org/download/{tarball}"
    if entry.nginx_tarball:
        fetch = f"cp {shlex.quote(entry.nginx_tarball)} {tarball}"
    source = shlex.quote(entry.nginx_tarball or "nginx.org")
    return f"""\
    {fetch} || exit 1
    sum=$(sha256sum <{tarball}) && sum=${{sum%% *}}
    if [ "$sum" != {entry.nginx_sha256} ]; then
        echo "pd-deploy: expected {_NGINX} from "{source}" with SHA-256" \\
            "{entry.nginx_sha256}, found $sum"
        exit 1
    fi"""
