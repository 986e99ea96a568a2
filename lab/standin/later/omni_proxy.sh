#!/bin/bash
# Stand-in for the omni proxy's script: its arguments, its locations; pd_handover.lua does the rest.
set -u

ROOT=${STANDIN_ROOT:-}
PREFIX=$ROOT/usr/local/nginx
NGINX=$ROOT/usr/sbin/nginx # as an RPM installs it
PID_FILE=$ROOT/run/nginx.pid
STANDIN=$ROOT/usr/local/Ascend/latest/standin
# From then on max_completion_tokens is handled; an ISO date compares as text.
COMPLETION_TOKENS_SINCE=2026-02-26
HEALTH_SINCE=2025-10-22

conf_file=$PREFIX/conf/nginx.conf
listen_port=7150
core_num=4
start_core=0
prefill_endpoints=
decode_endpoints=
log_file=/tmp/nginx_error.log
log_level=notice
access_log=/tmp/nginx_access.log
policy=sequential
model_path=
prefill_seqs=32
decode_seqs=32
max_body=10M
body_buffer=1M
subrequest_buffer=1M
reuseport=' reuseport'
action=start
rollback=0
dry_run=0
keep_nginx=0
declare -A number=( # what is only checked
    [--omni-proxy-max-batch-num-token]=32000
    [--omni-proxy-prefill-starvation-timeout]=400
    [--omni-proxy-max-tokens-weight]=1
    [--omni-proxy-max-request-slots]=16384
)

main() {
    parse "$@"
    case $action in
        stop)
            stop_nginx
            [ "$rollback" = 0 ] || restore_conf
            return
            ;;
        reload)
            [ -n "$(nginx_pids)" ] || fail "nginx does not run, there is nothing to reload"
            ;;
    esac
    check_arguments
    write_conf
    [ "$dry_run" = 1 ] && return
    [ -x "$NGINX" ] || fail "$NGINX does not exist"
    if ! "$NGINX" -t -c "$conf_file"; then
        [ "$action" = start ] || restore_conf
        fail "nginx -t refused $conf_file"
    fi
    if [ "$action" = reload ]; then
        "$NGINX" -s reload -c "$conf_file" || fail "nginx did not reload"
        return
    fi
    [ "$keep_nginx" = 1 ] || stop_nginx
    "$NGINX" -c "$conf_file" || fail "nginx did not start"
}

fail() {
    echo "omni_proxy.sh: $1" >&2
    exit 1
}

is_roles() {
    [ "$(cat "$STANDIN/contract")" = roles ]
}

usage() {
    cat <<'END'
Usage: omni_proxy.sh [options]
  --listen-port PORT                         (7150)
  --prefill-endpoints HOST:PORT,…
  --decode-endpoints HOST:PORT,…
  --core-num N                               (4)
  --start-core-index N                       (0)
  --log-file FILE                            (/tmp/nginx_error.log)
  --log-level LEVEL                          (notice)
  --access-log-file FILE                     (/tmp/nginx_access.log)
  --nginx-conf-file FILE
  --omni-proxy-pd-policy POLICY              sequential, parallel or aggregation
  --omni-proxy-model-path DIRECTORY
  --omni-proxy-max-batch-num-token N         (32000)
  --omni-proxy-prefill-max-num-seqs N        (32)
  --omni-proxy-decode-max-num-seqs N         (32)
  --omni-proxy-prefill-starvation-timeout N  (400)
  --omni-proxy-schedule-algo NAME            default or earliest_batch
  --omni-proxy-max-tokens-weight N
  --stream-ops NAME                          add, set_opt or off
  --no-reuseport
  --keepalive-nginx
  --dry-run, --stop, --reload, --rollback, --help
END
    is_roles && cat <<'END'
  --encode-endpoints HOST:PORT,…
  --client-max-body-size SIZE                (10M)
  --client-body-buffer-size SIZE             (1M)
  --subrequest-output-buffer-size SIZE       (1M)
  --omni-proxy-max-request-slots N           (16384)
END
    exit 0
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --help) usage ;;
            --dry-run) dry_run=1; shift; continue ;;
            --stop) action=stop; shift; continue ;;
            --reload) action=reload; shift; continue ;;
            --rollback) rollback=1; shift; continue ;;
            --no-reuseport) reuseport=; shift; continue ;;
            --keepalive-nginx) keep_nginx=1; shift; continue ;;
        esac
        is_known "$1" || fail "unknown option $1"
        [ $# -gt 1 ] || fail "$1 needs a value"
        set_option "$1" "$2"
        shift 2
    done
    [ "$rollback" = 0 ] || [ "$action" = stop ] || fail "--rollback only with --stop"
}

is_known() {
    case $1 in
        --encode-endpoints | --client-max-body-size | --client-body-buffer-size | \
            --subrequest-output-buffer-size | --omni-proxy-max-request-slots)
            is_roles ;;
        --listen-port | --prefill-endpoints | --decode-endpoints | --core-num | \
            --start-core-index | --log-file | --log-level | --access-log-file | \
            --nginx-conf-file | --omni-proxy-pd-policy | --omni-proxy-model-path | \
            --omni-proxy-max-batch-num-token | --omni-proxy-prefill-max-num-seqs | \
            --omni-proxy-decode-max-num-seqs | --omni-proxy-prefill-starvation-timeout | \
            --omni-proxy-schedule-algo | --omni-proxy-max-tokens-weight | --stream-ops) ;;
        *) return 1 ;;
    esac
}

set_option() {
    case $1 in
        --listen-port) listen_port=$2 ;;
        --prefill-endpoints) prefill_endpoints=$2 ;;
        --decode-endpoints) decode_endpoints=$2 ;;
        --encode-endpoints) fail "--encode-endpoints: the stand-in has no encode servers" ;;
        --core-num) core_num=$2 ;;
        --start-core-index) start_core=$2 ;;
        --log-file) log_file=$2 ;;
        --log-level) log_level=$2 ;;
        --access-log-file) access_log=$2 ;;
        --nginx-conf-file) conf_file=$2 ;;
        --omni-proxy-pd-policy) policy=$2 ;;
        --omni-proxy-model-path) model_path=$2 ;;
        --omni-proxy-prefill-max-num-seqs) prefill_seqs=$2 ;;
        --omni-proxy-decode-max-num-seqs) decode_seqs=$2 ;;
        --client-max-body-size) max_body=$2 ;;
        --client-body-buffer-size) body_buffer=$2 ;;
        --subrequest-output-buffer-size) subrequest_buffer=$2 ;;
        --omni-proxy-schedule-algo)
            one_of "$@" default earliest_batch ;;
        --stream-ops)
            one_of "$@" add set_opt off ;;
        *) number[$1]=$2 ;;
    esac
}

one_of() { # option value allowed…
    local option=$1 value=$2 allowed
    shift 2
    for allowed; do
        [ "$value" = "$allowed" ] && return
    done
    fail "$option must be one of: $*; found '$value'"
}

check_arguments() {
    local option
    [[ $listen_port =~ ^[0-9]+$ ]] && [ "$listen_port" -ge 1024 ] && [ "$listen_port" -le 65500 ] ||
        fail "--listen-port must be an integer from 1024 to 65500, found '$listen_port'"
    [[ $start_core =~ ^[0-9]+$ ]] || fail "--start-core-index must be an integer"
    positive --core-num "$core_num"
    positive --omni-proxy-prefill-max-num-seqs "$prefill_seqs"
    positive --omni-proxy-decode-max-num-seqs "$decode_seqs"
    for option in "${!number[@]}"; do
        positive "$option" "${number[$option]}"
    done
    one_of --omni-proxy-pd-policy "$policy" sequential parallel aggregation
    one_of --log-level "$log_level" debug info notice warn error crit alert emerg
    [ "$policy" = aggregation ] || check_endpoints --prefill-endpoints "$prefill_endpoints"
    check_endpoints --decode-endpoints "$decode_endpoints"
    # Its tokenizer is read from there.
    [ -z "$model_path" ] || [ -d "$model_path" ] ||
        fail "--omni-proxy-model-path: $model_path is no directory"
}

positive() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a positive integer, found '$2'"
}

check_endpoints() {
    [ -n "$2" ] || fail "$1 is required"
    [[ $2 =~ ^[^,:[:space:]]+:[0-9]+(,[^,:[:space:]]+:[0-9]+)*$ ]] ||
        fail "$1 must be host:port,host:port, found '$2'"
}

nginx_pids() {
    # Tests run without a pid namespace of their own: they may only stop the nginx they started.
    if [ -n "$ROOT" ]; then
        [ -f "$PID_FILE" ] && kill -0 "$(cat "$PID_FILE")" 2>/dev/null && cat "$PID_FILE"
        return
    fi
    local process name
    for process in /proc/[0-9]*; do
        read -r name 2>/dev/null <"$process/comm" && [ "$name" = nginx ] || continue
        grep -q '^State:.*zombie' "$process/status" 2>/dev/null || echo "${process#/proc/}"
    done
}

stop_nginx() {
    local pids
    while pids=$(nginx_pids) && [ -n "$pids" ]; do
        # shellcheck disable=SC2086  # a list
        kill -TERM $pids 2>/dev/null
        sleep 0.2
    done
}

restore_conf() {
    [ -f "${conf_file}_bak" ] || fail "${conf_file}_bak does not exist"
    mv "${conf_file}_bak" "$conf_file"
}

affinity_masks() {
    local core mask=1
    for ((core = 0; core < start_core + core_num; core++)); do
        ((core < start_core)) || printf ' %s' "$mask"
        mask+=0
    done
}

upstream() { # side endpoints
    local server
    echo "    upstream $1_servers {"
    echo "        balancer_by_lua_block { package.loaded.pd_handover.balance(\"$1\") }"
    for server in ${2//,/ }; do
        echo "        server $server;"
    done
    echo "        keepalive 2048;"
    echo "    }"
}

scored() { # side endpoints: the side's entry in the table of the servers to choose from
    local server
    printf '%s = { ' "$1"
    for server in ${2//,/ }; do
        printf '"%s:%s", ' "$(address "${server%:*}")" "${server##*:}"
    done
    printf '}, '
}

address() { # of a host; the choice in Lua takes no names
    local found
    found=$(getent ahostsv4 "$1" | head -n 1)
    echo "${found%% *}"
}

handles_completion_tokens() {
    if [[ $(cat "$STANDIN/built") < $COMPLETION_TOKENS_SINCE ]]; then echo false; else echo true; fi
}

health_location() {
    [[ $(cat "$STANDIN/built") < $HEALTH_SINCE ]] || cat <<'END'
        location = /omni_proxy/health {
            content_by_lua_block { package.loaded.pd_handover.health() }
        }
END
}

roles_locations() { # broadcasts, and the way to any address that this host reaches
    local path
    is_roles || return
    for path in sleep wake_up pause resume; do
        cat <<EOF
        location = /$path {
            content_by_lua_block { package.loaded.pd_handover.broadcast("/$path", ngx.HTTP_POST) }
        }
EOF
    done
    cat <<'EOF'
        location ~ ^/proxy/([0-9.]+:[0-9]+)(/.*)?$ {
            proxy_pass http://$1$2$is_args$args;
        }
EOF
}

write_conf() {
    mkdir -p "$(dirname "$conf_file")" "$(dirname "$PID_FILE")" "$PREFIX/tmp" ||
        fail "cannot make the directories of $conf_file"
    [ ! -f "$conf_file" ] || cp "$conf_file" "${conf_file}_bak"
    print_conf >"$conf_file" || fail "cannot write $conf_file"
}

print_conf() {
    cat <<EOF
load_module $ROOT/usr/lib/nginx/modules/ndk_http_module.so;
load_module $ROOT/usr/lib/nginx/modules/ngx_http_lua_module.so;

pid $PID_FILE;
worker_processes $core_num;
worker_cpu_affinity$(affinity_masks);
worker_rlimit_nofile 102400;
error_log $log_file $log_level;

events {
    use epoll;
    accept_mutex off;
    multi_accept on;
    worker_connections 102400;
}

http {
    lua_package_path "$ROOT/usr/share/lua/5.1/?.lua;;";
    lua_shared_dict pd_score 1m;
    # Loaded by the master, like a C module: the workers' user need not be able to read it.
    init_by_lua_block {
        package.loaded.pd_handover = assert(loadfile("$PREFIX/modules/pd_handover.lua"))()
        package.loaded.pd_handover.configure_omni({
            $(scored prefill "$prefill_endpoints")
            $(scored decode "$decode_endpoints")
        }, {
            policy = "$policy",
            prefill = $prefill_seqs,
            decode = $decode_seqs,
            handles_completion_tokens = $(handles_completion_tokens),
        })
    }
    log_by_lua_block { package.loaded.pd_handover.finish() }
    access_log $access_log;
    client_body_temp_path $PREFIX/tmp/body;
    proxy_temp_path $PREFIX/tmp/proxy;
    fastcgi_temp_path $PREFIX/tmp/fastcgi;
    scgi_temp_path $PREFIX/tmp/scgi;
    uwsgi_temp_path $PREFIX/tmp/uwsgi;
    tcp_nopush on;
    tcp_nodelay on;
    client_body_buffer_size $body_buffer;
    client_max_body_size $max_body;
    subrequest_output_buffer_size $subrequest_buffer;
    proxy_connect_timeout 600s;
    proxy_send_timeout 600s;
    proxy_read_timeout 14400s;
    proxy_buffering off;

$([ -z "$prefill_endpoints" ] || upstream prefill "$prefill_endpoints")
$(upstream decode "$decode_endpoints")
    server {
        listen $listen_port$reuseport;
        proxy_http_version 1.1;
        proxy_set_header Connection "";

        location /v1 {
            access_by_lua_block { package.loaded.pd_handover.to_decode() }
            proxy_pass http://decode_servers;
        }
        location ~ ^/v1(/chat)?/completions\$ {
            access_by_lua_block { package.loaded.pd_handover.hand_over() }
            proxy_pass http://decode_servers;
        }
        location /prefill_internal {
            internal;
            rewrite ^/prefill_internal(.*)\$ \$1 break;
            proxy_pass http://$([ -z "$prefill_endpoints" ] && echo decode || echo prefill)_servers;
        }
        location ~ ^/backend_internal/([^/]+)(/.*)\$ {
            internal;
            proxy_connect_timeout 2s;
            proxy_read_timeout 5s;
            proxy_pass http://\$1\$2;
        }
$(health_location)
        location = /omni_proxy/metrics {
            content_by_lua_block { package.loaded.pd_handover.metrics() }
        }
        location = /health {
            content_by_lua_block { package.loaded.pd_handover.broadcast("/health") }
        }
        location = /metrics {
            content_by_lua_block { package.loaded.pd_handover.broadcast("/metrics") }
        }
$(roles_locations)
        location / {
            root $PREFIX/html;
        }
    }
}
EOF
}

main "$@"
