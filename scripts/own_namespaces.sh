#!/usr/bin/env bash
# Runs a command as root in new mount, network, PID, IPC and cgroup namespaces, with a private /dev and /run:
# own_namespaces.sh COMMAND ARGUMENT…; exits with the command's status. Kills processes that the command leaves.
# `own_namespaces.sh --check` exits with status 0 if this host can do it. It needs the memory controller of cgroup v1. On
# cgroup v2, a group with processes cannot enable controllers for groups below it.
set -euo pipefail

# Prints the mount points of cgroup hierarchies and their mount options: one line "POINT TYPE OPTION" for each.
hierarchies() {
    awk '$3 == "cgroup" || $3 == "cgroup2" {
        wanted = ""
        count = split($4, options, ",")
        for (i = 1; i <= count; i++)
            if (options[i] ~ /^name=/) wanted = "none," options[i]
            else if (options[i] ~ /^(cpu|cpuacct|cpuset|memory|devices|freezer|blkio|pids|hugetlb|net_cls|net_prio|perf_event|rdma|misc)$/)
                wanted = wanted (wanted == "" ? "" : ",") options[i]
        print $2, $3, (wanted == "" ? "rw" : wanted)
    }' /proc/self/mounts
}

leave_groups() {
    local point try
    for try in {1..50}; do
        for point in $(hierarchies | cut -d' ' -f1); do
            [[ ! -d $point/$GROUP ]] || find "$point/$GROUP" -depth -type d -exec rmdir {} + 2>/dev/null || true
        done
        compgen -G "/sys/fs/cgroup/*/$GROUP" >/dev/null || return 0
        sleep 0.2
    done
    echo "own_namespaces: groups named $GROUP are left below /sys/fs/cgroup" >&2
}

enter_groups() {
    local point
    for point in $(hierarchies | cut -d' ' -f1); do
        mkdir "$point/$GROUP"
        if [[ -e $point/cpuset.cpus ]]; then
            cat "$point/cpuset.cpus" >"$point/$GROUP/cpuset.cpus"
            cat "$point/cpuset.mems" >"$point/$GROUP/cpuset.mems"
        fi
        echo "$BASHPID" >"$point/$GROUP/cgroup.procs"
    done
}

own_cgroups() {
    local list point kind options
    list=$(hierarchies)
    umount --lazy /sys/fs/cgroup
    mount -t sysfs sysfs /sys
    mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
    while read -r point kind options; do
        mkdir -p "$point"
        mount -t "$kind" -o "$options" "$kind" "$point"
    done <<<"$list"
}

own_dev() {
    local new=/tmp/own-dev.$GROUP
    mkdir "$new"
    mount -t tmpfs -o mode=755 devtmpfs "$new"
    cp -a -x /dev/. "$new/"
    mount -t devpts -o newinstance,mode=600,ptmxmode=666 devpts "$new/pts"
    ln -sf pts/ptmx "$new/ptmx"
    mount -t tmpfs -o mode=1777 tmpfs "$new/shm"
    mount --move "$new" /dev
    rmdir "$new"
}

own_run() {
    local copy=/tmp/own-run.$GROUP
    mkdir "$copy"
    # Files that change during the copy and pinned namespaces cannot be copied, and are not needed.
    find /run -mindepth 1 -maxdepth 1 ! -name 'podkeel*' \
        -exec cp -a -x --target-directory="$copy" {} + 2>/dev/null || true
    mount -t tmpfs -o mode=755 tmpfs /run
    cp -a "$copy/." /run/
    rm -rf "$copy"
}

if [[ ${1:-} == --check ]]; then
    ((EUID == 0)) && hierarchies | grep -q ' cgroup memory$'
    exit
fi
if [[ ${1:-} == --inside ]]; then
    GROUP=$2
    shift 2
    ip link set lo up
    own_cgroups
    own_dev
    own_run
    exec catatonit -- "$@"
fi
GROUP=own-namespaces-$$
trap leave_groups EXIT
(
    enter_groups
    # Cgroup mounts show the new root only if they are made after the cgroup namespace.
    exec unshare --mount --net --pid --ipc --cgroup --fork --mount-proc --kill-child=KILL \
        "${BASH_SOURCE[0]}" --inside "$GROUP" "$@"
) </dev/null &
child=$!
trap 'kill -KILL "$child"' INT TERM
status=0
wait "$child" || status=$?
exit "$status"
