#!/bin/sh
# Turns the fresh namespaces it is started in into one simulated host, as their process 1.
# In:  LOWER (read-only layers of its root), BOX (its directory), HOST (its name), ADDRESS (with
#      prefix length), HARDWARE_ADDRESS, GATEWAY (empty on the switch itself), SHARED (paths, one
#      a line), DEVICES (names of its NPU devices).
# Says its process id as the machine sees it, waits for one line (its network link is plugged
# in), says "ready". End of input instead of that line: the starter died, so does this.
set -eu

# /proc is the machine's until it is mounted anew, so this is the machine's number.
read -r pid _ </proc/self/stat
echo "$pid"
read -r _plugged

disk=$BOX/disk
root=$BOX/root

mount_root() {
    mkdir -p "$disk/upper" "$disk/work" "$disk/docker" "$root"
    mount -t overlay overlay \
        -o "lowerdir=$LOWER,upperdir=$disk/upper,workdir=$disk/work" "$root"
}

make_devices() {
    mount -t tmpfs -o mode=755 tmpfs dev
    mkdir dev/pts dev/shm
    mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
    mount -t tmpfs -o mode=1777 tmpfs dev/shm
    mknod -m 666 dev/null c 1 3
    mknod -m 666 dev/zero c 1 5
    mknod -m 666 dev/full c 1 7
    mknod -m 666 dev/random c 1 8
    mknod -m 666 dev/urandom c 1 9
    mknod -m 666 dev/tty c 5 0
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    ln -s /proc/self/fd/0 dev/stdin
    ln -s /proc/self/fd/1 dev/stdout
    ln -s /proc/self/fd/2 dev/stderr
    for device in $DEVICES; do
        mknod -m 660 "dev/$device" c 1 3
    done
}

share() {
    while read -r path; do
        [ -n "$path" ] || continue
        mkdir -p "$root$path"
        mount -o bind,ro "$path" "$root$path"
    done
}

set_up_network() {
    ip link set lo up
    if [ -z "$GATEWAY" ]; then
        ip link add eth0 type bridge
    fi
    ip link set dev eth0 address "$HARDWARE_ADDRESS"
    ip address add "$ADDRESS" dev eth0
    ip link set eth0 up
    if [ -n "$GATEWAY" ]; then
        ip route add default via "$GATEWAY"
    fi
}

# A state directory that is itself an overlay can't hold an upper layer.
if ! mount_root 2>/dev/null; then
    mount -t tmpfs tmpfs "$disk"
    mount_root
fi
cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
make_devices
mount -t tmpfs -o mode=755 tmpfs run
mkdir run/sshd
mkdir -p var/lib/docker
mount --bind "$disk/docker" var/lib/docker
printf '%s\n' "$SHARED" | share
hostname "$HOST"
set_up_network

mkdir -p .machine
pivot_root . .machine
cd /
umount -l /.machine
rmdir /.machine
echo ready
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    tini -- sleep infinity </dev/null >/dev/null 2>&1
