#!/bin/bash
# Stand-in for the global proxy's script: arguments of contract 5.2, configuration of 5.3.
# What nine C modules do upstream, pd_handover.lua does here.
set -u

ROOT=${STANDIN_ROOT:-}
PREFIX=$ROOT/usr/local/nginx
PID_FILE=$ROOT/run/nginx.pid
# Options that came with images of this date; an ISO date compares as text.
NEW_OPTIONS_SINCE=2025-10-10
RPM_SINCE=2026-01-01 # an RPM installs nginx, no build
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

conf_file=$PREFIX/conf/nginx.conf
start_core=0
core_num=4
listen_port=8080
prefill_servers=
decode_servers=
prefill_lb=pd_score_balance
decode_lb=pd_score_balance
body_buffer=1024K
log_file=
log_level=
prefill_seqs=16
decode_seqs=32
access_log=/tmp/nginx_access.log
dry_run=0
stop=0
rollback=0

main() {
    BUILT=$(built)
    NGINX=$(nginx_program)
    parse "$@"
    if [ "$stop" = 1 ]; then
        stop_nginx
        [ "$rollback" = 0 ] || restore_conf
        return
    fi
    check_arguments
    write_conf
    [ "$dry_run" = 1 ] && return
    [ -x "$NGINX" ] || fail "$NGINX does not exist: run build.sh first"
    "$NGINX" -t -c "$conf_file" || fail "nginx -t refused $conf_file"
    stop_nginx
    "$NGINX" -c "$conf_file" || fail "nginx did not start"
}

fail() {
    echo "global_proxy.sh: $1" >&2
    exit 1
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            -d | --dry-run) dry_run=1; shift; continue ;;
            -S | --stop) stop=1; shift; continue ;;
            -R | --rollback) rollback=1; shift; continue ;;
        esac
        is_known "$1" || fail "unknown option $1"
        [ $# -gt 1 ] || fail "$1 needs a value"
        set_option "$1" "$2"
        shift 2
    done
    [ "$rollback" = 0 ] || [ "$stop" = 1 ] || fail "--rollback only with --stop"
}

built() { # the date of the tree that this script is in, if that has one of its own, or else of the
    # image: below the root, or below the one that this script is in
    local file=usr/local/Ascend/latest/standin/built tree=$here
    until [ -f "$tree/STANDIN_AGE" ] || [ -z "$tree" ]; do tree=${tree%/*}; done
    cut -d " " -f 2 "$tree/STANDIN_AGE" 2>/dev/null && return
    cat "$ROOT/$file" 2>/dev/null || cat "$here/../../../../../../$file"
}

nginx_program() {
    if [[ $BUILT < $RPM_SINCE ]]; then echo "$PREFIX/nginx"; else echo "$ROOT/usr/sbin/nginx"; fi
}

has_new_options() {
    [[ ! $BUILT < $NEW_OPTIONS_SINCE ]]
}

is_known() {
    case $1 in
        -f | --nginx-conf-file | -s | --start-core-index | -c | --core-num | -p | --listen-port | \
            --prefill-servers-list | --decode-servers-list | --prefill-lb-sdk | --decode-lb-sdk | \
            --client-body-buffer-size | -l | --log-file | --log-level) return 0 ;;
        --prefill-max-num-seqs | --decode-max-num-seqs | --access-log-file)
            has_new_options && return 0 ;;
    esac
    return 1
}

set_option() {
    case $1 in
        -f | --nginx-conf-file) conf_file=$2 ;;
        -s | --start-core-index) start_core=$2 ;;
        -c | --core-num) core_num=$2 ;;
        -p | --listen-port) listen_port=$2 ;;
        --prefill-servers-list) prefill_servers=$2 ;;
        --decode-servers-list) decode_servers=$2 ;;
        --prefill-lb-sdk) prefill_lb=$2 ;;
        --decode-lb-sdk) decode_lb=$2 ;;
        --client-body-buffer-size) body_buffer=$2 ;;
        -l | --log-file) log_file=$2 ;;
        --log-level) log_level=$2 ;;
        --prefill-max-num-seqs) prefill_seqs=$2 ;;
        --decode-max-num-seqs) decode_seqs=$2 ;;
        --access-log-file) access_log=$2 ;;
    esac
}

check_arguments() {
    [[ $listen_port =~ ^[0-9]+$ ]] && [ "$listen_port" -ge 1024 ] && [ "$listen_port" -le 65500 ] ||
        fail "--listen-port must be an integer from 1024 to 65500, found '$listen_port'"
    [[ $core_num =~ ^[1-9][0-9]*$ ]] || fail "--core-num must be a positive integer"
    [[ $start_core =~ ^[0-9]+$ ]] || fail "--start-core-index must be an integer"
    [[ $prefill_seqs =~ ^[1-9][0-9]*$ ]] || fail "--prefill-max-num-seqs must be a positive integer"
    [[ $decode_seqs =~ ^[1-9][0-9]*$ ]] || fail "--decode-max-num-seqs must be a positive integer"
    check_servers --prefill-servers-list "$prefill_servers"
    check_servers --decode-servers-list "$decode_servers"
    case $log_level in
        '' | debug | info | notice | warn | error | crit | alert | emerg) ;;
        *) fail "--log-level must be debug … emerg, found '$log_level'" ;;
    esac
}

check_servers() {
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

balance() { # side name
    case $2 in
        round_robin) ;;
        pd_score_balance)
            echo "        balancer_by_lua_block { package.loaded.pd_handover.balance(\"$1\") }" ;;
        least_conn) echo "        least_conn;" ;;
        weighted_least_active | greedy_timeout | prefill_score_balance | \
            least_total_load | auto_balance_controller | length_balance)
            echo "        least_conn;  # in place of $2" ;;
        # Verbatim, so that nginx -t refuses it (5.2).
        *) echo "        $2;" ;;
    esac
}

upstream() { # side servers lb
    local server
    echo "    upstream $1_servers {"
    balance "$1" "$3"
    for server in ${2//,/ }; do
        echo "        server $server max_fails=3 fail_timeout=10s;"
    done
    cat <<EOF
        keepalive 2048;
        keepalive_timeout 110s;
        keepalive_requests 20000;
    }
EOF
}

scored() { # side servers lb: the side's entry in the table of the servers to choose from
    local server
    [ "$3" = pd_score_balance ] || return
    printf '%s = { ' "$1"
    for server in ${2//,/ }; do
        printf '"%s:%s", ' "$(address "${server%:*}")" "${server##*:}"
    done
    printf '}, '
}

address() { # of a host; the choice in Lua takes no names
    local found
    found=$(getent ahostsv4 "$1")
    echo "${found%%[[:space:]]*}"
}

decode_limit() { # active requests of one decode server
    if has_new_options; then echo "$decode_seqs"; else echo 25; fi
}

access_log_line() {
    if has_new_options; then echo "access_log $access_log;"; else echo "access_log off;"; fi
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
${log_file:+error_log $log_file $log_level;}

events {
    use epoll;
    accept_mutex off;
    multi_accept on;
    worker_connections 102400;
}

http {
    lua_package_path "$ROOT/usr/share/lua/5.1/?.lua;;";
    # Loaded by the master, like a C module: the workers' user need not be able to read it.
    lua_shared_dict pd_score 1m;
    init_by_lua_block {
        package.loaded.pd_handover = assert(loadfile("$PREFIX/modules/pd_handover.lua"))()
        package.loaded.pd_handover.configure({
            $(scored prefill "$prefill_servers" "$prefill_lb")
            $(scored decode "$decode_servers" "$decode_lb")
        }, $(decode_limit))
    }
    log_by_lua_block { package.loaded.pd_handover.finish() }
    $(access_log_line)
    client_body_temp_path $PREFIX/tmp/body;
    proxy_temp_path $PREFIX/tmp/proxy;
    fastcgi_temp_path $PREFIX/tmp/fastcgi;
    scgi_temp_path $PREFIX/tmp/scgi;
    uwsgi_temp_path $PREFIX/tmp/uwsgi;
    tcp_nopush on;
    tcp_nodelay on;
    sendfile_max_chunk 512k;
    keepalive_requests 20000;
    client_header_buffer_size 512k;
    large_client_header_buffers 4 512k;
    client_body_buffer_size $body_buffer;
    client_max_body_size 100m;
    proxy_read_timeout 14400s;
    subrequest_output_buffer_size 1m;

$(upstream prefill "$prefill_servers" "$prefill_lb")
$(upstream decode "$decode_servers" "$decode_lb")
    server {
        listen $listen_port reuseport;
        proxy_http_version 1.1;
        proxy_set_header Connection "";

        location /v1 {
            access_by_lua_block { package.loaded.pd_handover.to_prefill() }
            proxy_pass http://prefill_servers;
        }
        location ~ ^/v1(/chat)?/completions\$ {
            access_by_lua_block { package.loaded.pd_handover.hand_over() }
            proxy_pass http://decode_servers;
        }
        location /prefill_internal {
            internal;
            rewrite ^/prefill_internal(.*)\$ \$1 break;
            proxy_pass http://prefill_servers;
        }
        location / {
            root $PREFIX/html;
        }
    }
}
EOF
}

main "$@"
