#!/usr/bin/env bash
# Runs systemd as the first process of a PID namespace in this root, and test_systemd.sh as its service. Exits with 0 if
# that passed. cgroup v1: systemd 256 and later accept it only by a variable on the kernel's command line, which is that
# of the first process here.
set -euo pipefail
cat >/etc/systemd/system/test.service <<'UNIT'
[Unit]
SuccessAction=exit-force
FailureAction=exit-force
After=basic.target
[Service]
Type=oneshot
ExecStart=/srv/test_systemd.sh
StandardOutput=append:/srv/systemd.log
StandardError=inherit
UNIT
: >/srv/systemd.log
tail -n +1 --follow /srv/systemd.log >&2 &
follower=$!
container=other unshare --pid --mount --fork --kill-child=KILL bash -c '
    mount -t proc proc /proc
    exec /lib/systemd/systemd --unit=test.service --show-status=no systemd.unified_cgroup_hierarchy=0 \
        SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1
' >/srv/boot.log 2>&1 || true
sleep 1 # for the last lines
kill "$follower"
grep -q 'systemd: all passed' /srv/systemd.log || {
    tail -n 20 /srv/boot.log >&2
    exit 1
}
rm -f /etc/systemd/system/test.service
