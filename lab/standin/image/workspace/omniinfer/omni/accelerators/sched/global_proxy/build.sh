#!/bin/bash
# Stand-in for the proxy's build (contract 5.1): needs the unpacked nginx sources beside it.
# "Compiles" what the image's variant without nginx keeps below /usr/libexec/standin.
set -eu

ROOT=${STANDIN_ROOT:-}
KEPT=$ROOT/usr/libexec/standin
PREFIX=$ROOT/usr/local/nginx
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sources=$here/nginx-${NGINX_VERSION:-1.24.0}

fail() {
    echo "build.sh: $1" >&2
    exit 1
}

[ -z "${http_proxy:-}${https_proxy:-}" ] || fail "http_proxy or https_proxy is set: unset both first"
[ -d "$sources" ] || fail "$sources does not exist: unpack the nginx sources there first"
if [ -x "$PREFIX/nginx" ]; then
    echo "build.sh: $PREFIX/nginx is there already"
    exit 0
fi
[ -f "$KEPT/nginx" ] || fail "$KEPT/nginx does not exist: this image cannot build nginx"
echo "build.sh: compiling $(basename "$sources") with nine modules"
sleep 1 # models the compiler
mkdir -p "$PREFIX/conf" "$PREFIX/modules"
cp "$KEPT/pd_handover.lua" "$PREFIX/modules/"
# Copies, so that the directory can be kept and used in another container.
install -m 755 "$KEPT/nginx" "$PREFIX/nginx"
echo "build.sh: installed $PREFIX/nginx"
