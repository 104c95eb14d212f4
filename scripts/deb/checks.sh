# shellcheck shell=bash
# The checks and steps of test_inside.sh.
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd /srv

say() { printf 'test-deb:   %s\n' "$*" >&2; }
fail() {
    say "FAILED: $*"
    tail -n 20 /srv/dpkg.log /srv/agent.log >&2 2>/dev/null || true
    journalctl --no-pager -n 30 -u podkeel >&2 2>/dev/null || true
    exit 1
}
wait_for() {
    local try
    for try in {1..600}; do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.2
    done
    fail "this did not become true in two minutes: $*"
}
is_gone() { [[ ! -d /proc/$1 ]]; }

start_agent() {
    podkeel serve --metrics-address 127.0.0.1:0 >>/srv/agent.log 2>&1 &
    agent=$!
    wait_for podkeel info
}
end_agent() {
    kill "$agent"
    wait "$agent" || fail "the agent ended with status $?"
}

# What a purge must not leave: files, mounts, links, tables, groups, processes.
traces() {
    find / -xdev \( -path /srv -o -path /proc -o -path /sys \) -prune -o -iname '*podkeel*' -print |
        grep -v -e '^/var/lib/dpkg/' -e '^/var/log/' || true
    find /run /etc/systemd /sys/fs/cgroup -iname '*podkeel*' -print
    grep podkeel /proc/self/mountinfo || true
    ip -o link | grep -i podkeel || true
    nft list tables | grep -i podkeel || true
    pgrep -a conmon || true
}
nothing_left() {
    local left
    left=$(traces)
    [[ -z $left ]] || fail "the purge left: $left"
}

install() { dpkg -i "$1" >/srv/dpkg.log 2>&1 || fail "dpkg could not install $1"; }

# Starts a pod; pid is the first process of its container.
run_pod() {
    podkeel image import /srv/busybox.tar --reference localhost/busybox:latest
    podkeel run /srv/pod.yaml
    wait_for sh -c 'podkeel logs main | grep -q started'
    pid=$(podkeel inspect main | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' | head -1)
    [[ -n $pid && -d /proc/$pid ]] || fail "the container has no process: $pid"
}

# The agent is of the later package, and reaches the container.
check_later() {
    local version
    version=$(podkeel --version | cut -d' ' -f2)
    [[ $version != 0.0.0a1 ]] || fail "the upgrade left the command as it was"
    podkeel version | grep -qF "agent            podkeel $version," || fail "another agent: $(podkeel version)"
    [[ $(podkeel exec main echo in it) == "in it" ]] || fail "no exec after the upgrade"
}
