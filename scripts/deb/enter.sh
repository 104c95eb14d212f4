#!/usr/bin/env bash
# Runs a command in a root file system, in the mount namespace of its own that own_namespaces.sh made:
# enter.sh ROOT COMMAND ARGUMENT…
set -euo pipefail
root=$1
shift
mount --make-rprivate /
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
cd "$root"
mkdir -p old
pivot_root . old
umount --lazy /old
rmdir /old
exec "$@"
