#!/usr/bin/env bash
# Installs, runs, upgrades, removes and purges the package in this root, which scripts/test_deb.sh made. No network.
set -euo pipefail
source /srv/checks.sh

before=$(traces)
[[ -z $before ]] || fail "this root has traces of podkeel already: $before"

say "install"
install earlier.deb
! pgrep -x podkeel || fail "the installation started an agent"
[[ ! -e /etc/systemd/system/multi-user.target.wants/podkeel.service ]] || fail "the installation enabled the service"
[[ $(podkeel --version) == "podkeel 0.0.0a1" ]] || fail "podkeel --version: $(podkeel --version)"
[[ -z $(dpkg --verify podkeel) ]] || fail "dpkg --verify: $(dpkg --verify podkeel)"
systemd-analyze verify --man=no /usr/lib/systemd/system/podkeel.service >/srv/verify.log 2>&1 || true
! grep -i podkeel /srv/verify.log || fail "systemd finds faults in the unit"
for page in man1/podkeel.1 man5/podkeel.toml.5 man8/podkeel-check.8; do
    gzip -dc "/usr/share/man/$page.gz" 2>/dev/null | grep -q '^.SH' || grep -q "path-exclude.*man" -r /etc/dpkg/dpkg.cfg.d || fail "no page $page"
done
bash -c 'source /usr/share/bash-completion/completions/podkeel' || fail "bash cannot read the completions"

say "run a pod"
start_agent
run_pod

say "upgrade while the container runs"
echo '# changed here' >>/etc/podkeel/config.toml
install later.deb
grep -q 'changed here' /etc/podkeel/config.toml || fail "the upgrade replaced the changed configuration"
end_agent
start_agent
check_later
[[ -d /proc/$pid ]] || fail "the container ended with the upgrade"

say "remove: pods stay, and how to end them is said"
end_agent
dpkg -r podkeel >/srv/dpkg.log 2>&1 || fail "dpkg could not remove it"
grep -q 'podkeel reset --yes' /srv/dpkg.log || fail "the removal does not say how to reset"
[[ -d /proc/$pid ]] || fail "the removal ended the container"
[[ ! -e /usr/lib/podkeel && ! -e /usr/bin/podkeel ]] || fail "the removal left: $(find /usr -name '*podkeel*')"

say "install again: the pod is found"
install later.deb
start_agent
podkeel exec main true || fail "the container is not there after a removal and a new installation"
end_agent

say "purge: nothing is left"
dpkg --purge podkeel >/srv/dpkg.log 2>&1 || fail "dpkg could not purge it"
wait_for is_gone "$pid"
nothing_left
