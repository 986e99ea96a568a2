#!/bin/bash
# Stand-in for the proxy's build (contract 5.1): needs the unpacked nginx sources beside it and
# installs below /usr/local/nginx what the image's remove-nginx took away.
set -eu

ROOT=${STANDIN_ROOT:-}
KEPT=$ROOT/usr/libexec/standin/nginx-install
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sources=$here/nginx-${NGINX_VERSION:-1.24.0}

fail() {
    echo "build.sh: $1" >&2
    exit 1
}

[ -z "${http_proxy:-}${https_proxy:-}" ] || fail "http_proxy or https_proxy is set: unset both first"
[ -d "$sources" ] || fail "$sources does not exist: unpack the nginx sources there first"
if [ -x "$ROOT/usr/local/nginx/nginx" ]; then
    echo "build.sh: /usr/local/nginx/nginx is there already"
    exit 0
fi
[ -d "$KEPT" ] || fail "nothing to build from: this image was not made by remove-nginx"
echo "build.sh: compiling $(basename "$sources") with nine modules"
sleep 1  # models the compiler
mkdir -p "$ROOT/usr/local/nginx"
cp -a "$KEPT/." "$ROOT/usr/local/nginx/"
echo "build.sh: installed /usr/local/nginx/nginx"
