#!/bin/bash
# Stand-in for the proxy's build (contract 5.1): needs the unpacked nginx sources beside it, of the
# version that NGINX_VERSION says; sources of another one are passed over.
# "Compiles" what the image's variant without nginx keeps below /usr/libexec/standin.
set -eu

# Upstream's default version was another one by this day, if not before; an ISO date compares as text.
NEW_VERSION_SINCE=2025-10-23

ROOT=${STANDIN_ROOT:-}
KEPT=$ROOT/usr/libexec/standin
PREFIX=$ROOT/usr/local/nginx
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

built() { # the date of the tree that this script is in, if that has one of its own, or else of the
    # image: below the root, or below the one that this script is in
    local file=usr/local/Ascend/latest/standin/built tree=$here
    until [ -f "$tree/STANDIN_AGE" ] || [ -z "$tree" ]; do tree=${tree%/*}; done
    cut -d " " -f 2 "$tree/STANDIN_AGE" 2>/dev/null && return
    cat "$ROOT/$file" 2>/dev/null || cat "$here/../../../../../../$file"
}

version=1.24.0
[[ $(built) < $NEW_VERSION_SINCE ]] || version=1.28.0
sources=$here/nginx-${NGINX_VERSION:-$version}

fail() {
    echo "build.sh: $1" >&2
    exit 1
}

# Upstream's script downloads what is not there.
[ -d "$sources" ] || fail "$sources does not exist: unpack the nginx sources there first"
if [ -x "$PREFIX/nginx" ]; then
    echo "build.sh: $PREFIX/nginx is there already"
    exit 0
fi
[ -f "$KEPT/nginx" ] || fail "$KEPT/nginx does not exist: this image cannot build nginx"
echo "build.sh: compiling $(basename "$sources") with nine modules"
sleep 0.2 # models the compiler
mkdir -p "$PREFIX/conf" "$PREFIX/modules"
cp "$KEPT/pd_handover.lua" "$PREFIX/modules/"
# Copies, so that the directory can be kept and used in another container.
install -m 755 "$KEPT/nginx" "$PREFIX/nginx"
echo "build.sh: installed $PREFIX/nginx"
