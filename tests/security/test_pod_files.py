"""Containers may write to resolv.conf, hosts and hostname, but this uses no space of the node's run folder."""

from __future__ import annotations

import os

from tests.integration.agent.hardening import like_kubelets
from tests.security.conftest import StartAttacker
from tests.support.agent import AgentProcess

FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/hostname")
MAX_BYTES = 2 << 20


def test_containers_cannot_fill_the_run_folder(quiet_log: AgentProcess, attacker: StartAttacker) -> None:
    ours = attacker(like_kubelets("main"))
    for file in FILES:
        assert ours.shell(f"echo added >> {file}; tail -n 1 {file}") == "added\n"
    files = " ".join(FILES)
    ours.shell(f"for file in {files}; do cat /dev/zero | head -c 33554432 >> $file; done")
    sizes = [int(size) for size in ours.shell(f"stat -c %s {files}").split()]
    assert 0 < sum(sizes) <= MAX_BYTES
    room = os.statvfs(quiet_log.run)
    inside = ours.shell("stat -f -c '%S %b' /etc/hosts").split()
    assert int(inside[0]) * int(inside[1]) <= MAX_BYTES < room.f_frsize * room.f_blocks
    again = ours.beside(like_kubelets("again"))
    assert quiet_log.client.output(again, "stat", "-c", "%s", "/etc/resolv.conf").strip() == str(sizes[0])


def test_files_of_a_pod_belong_to_root_and_cannot_be_executed(quiet_log: AgentProcess, attacker: StartAttacker) -> None:
    ours = attacker(like_kubelets("main"))
    for file in FILES:
        assert ours.shell(f"stat -c '%u %g %a' {file}").split() == ["0", "0", "644"]
    script = "printf '#!/bin/sh\\necho ran\\n' > /etc/hostname; chmod 4755 /etc/hostname; /etc/hostname; echo ended"
    assert "ran" not in ours.shell(script).split()
