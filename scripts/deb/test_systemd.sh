#!/usr/bin/env bash
# What the package does under systemd, which runs this as a service: boot_systemd.sh. No network.
set -euo pipefail
source /srv/checks.sh
readonly CHANGES=/run/systemd/system/podkeel.service.d/test.conf

property() { systemctl show --property="$1" --value "${2:-podkeel}"; }
main_pid() { property MainPID; }
is_active() { [[ $(systemctl is-active podkeel) == active ]]; }
another_main_pid() { is_active && [[ $(main_pid) != 0 && $(main_pid) != "$1" ]]; }
is_alone() { [[ $(cat "/sys/fs/cgroup/systemd$(property ControlGroup)/cgroup.procs") == "$(main_pid)" ]]; }
has_status() { [[ $(property StatusText) == *"$1"* ]]; }
journal_has() { journalctl --no-pager -o cat -u podkeel "${@:2}" | grep -qF -- "$1"; }
has_started_again() { (($(property NRestarts) > $1)); }

# Settings of the unit for some steps; without arguments, those of the package.
change_unit() {
    mkdir -p "${CHANGES%/*}"
    printf '%s\n' '[Service]' "$@" >"$CHANGES"
    systemctl daemon-reload
}

# The container of run_pod runs on, with the same processes, and answers.
nothing_happened_to_the_pod() {
    [[ -d /proc/$pid && -d /proc/$conmon ]] || fail "the container or its conmon ended: $1"
    wait_for is_active
    [[ $(podkeel exec main echo in it) == "in it" ]] || fail "no exec: $1"
}

say "systemd: the installation enables and starts nothing"
install earlier.deb
! systemctl --quiet is-enabled podkeel.service podkeel.socket || fail "the installation enabled a unit"
! is_active || fail "the installation started the agent"

say "systemd: the start waits until the agent is ready; nothing of a pod is in the service's cgroup"
systemctl enable --now podkeel 2>/dev/null
podkeel info >/dev/null || fail "the start ended before the agent served"
run_pod
conmon=$(pgrep -xo conmon)
wait_for is_alone
wait_for has_status 'running containers: 1'
scope=podkeel-monitors-$(cat /var/lib/podkeel/agent-id).scope
grep -q "/$scope\$" "/proc/$conmon/cgroup" || fail "conmon is not in $scope: $(cat "/proc/$conmon/cgroup")"

say "systemd: an upgrade restarts the agent, and no container notices"
agent=$(main_pid)
install later.deb
wait_for another_main_pid "$agent"
check_later
nothing_happened_to_the_pod "upgrade"

say "systemd: nothing happens to a pod when the service is killed, with the worst settings"
change_unit KillMode=control-group OOMPolicy=kill
agent=$(main_pid)
systemctl kill --signal=KILL podkeel
wait_for another_main_pid "$agent"
nothing_happened_to_the_pod "systemctl kill"
systemctl restart podkeel
nothing_happened_to_the_pod "restart"
systemctl stop podkeel
[[ -d /proc/$pid && -d /proc/$conmon ]] || fail "the container or its conmon ended with the service"
change_unit KillMode=control-group OOMPolicy=kill MemoryHigh=infinity MemoryMax=20M TimeoutStartSec=60
systemctl start --no-block podkeel
wait_for has_started_again "$(property NRestarts)"
change_unit
systemctl restart podkeel
nothing_happened_to_the_pod "kills for memory"

say "systemd: an agent whose loop hangs is restarted"
change_unit WatchdogSec=3 TimeoutAbortSec=3
systemctl restart podkeel
agent=$(main_pid)
kill -STOP "$agent"
wait_for another_main_pid "$agent"
wait_for journal_has 'Watchdog timeout'
change_unit
systemctl restart podkeel
nothing_happened_to_the_pod "watchdog"

say "systemd: a reload applies changes; a broken file changes nothing; warnings have their priority"
agent=$(main_pid)
mkdir -p /etc/podkeel/conf.d
echo 'images.pinned = ["registry.test/one"]' >/etc/podkeel/conf.d/10.toml
systemctl reload podkeel
wait_for journal_has 'read again: changed: images.pinned'
echo 'this is = no configuration' >/etc/podkeel/conf.d/20.toml
systemctl reload podkeel
wait_for journal_has 'the old one stays in force' -p warning
wait_for journal_has 'serving the CRI'
! journal_has 'serving the CRI' -p warning || fail "lines of level info have the priority of warnings"
rm -r /etc/podkeel/conf.d
[[ $(main_pid) == "$agent" ]] && is_active || fail "a reload restarted the agent"

say "systemd: the first client starts the agent by its socket"
systemctl stop podkeel
systemctl start podkeel.socket
! is_active || fail "the socket alone started the agent"
podkeel info >/dev/null || fail "a client of the socket was not served"
nothing_happened_to_the_pod "socket activation"
systemctl stop podkeel.socket podkeel
systemctl start podkeel

say "systemd: a removal stops the agent only; a new installation of the enabled service starts it again"
dpkg -r podkeel >/srv/dpkg.log 2>&1 || fail "dpkg could not remove it"
! pgrep -x podkeel || fail "the removal left an agent running"
[[ -d /proc/$pid ]] || fail "the removal ended the container"
install later.deb
wait_for is_active
nothing_happened_to_the_pod "a removal and a new installation"

say "systemd: a purge leaves nothing"
dpkg --purge podkeel >/srv/dpkg.log 2>&1 || fail "dpkg could not purge it"
wait_for is_gone "$pid"
[[ $(property ActiveState "$scope") == inactive ]] || fail "$scope is left"
rm -r "${CHANGES%/*}"
systemctl daemon-reload
nothing_left
say "systemd: all passed"
