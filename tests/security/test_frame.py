"""The pods of the other files have the properties that those tests rely on."""

from __future__ import annotations

from tests.integration.agent.hardening import like_kubelets
from tests.security.conftest import FIRST_ID, StartAttacker
from tests.support.agent import AgentProcess


def test_attackers_have_the_configured_users(
    quiet_log: AgentProcess, attacker: StartAttacker, user_namespace: bool
) -> None:
    ours = attacker(like_kubelets("main"))
    first = ours.shell("cat /proc/self/uid_map").split()[1]
    assert first == (str(FIRST_ID) if user_namespace else "0")
    assert ours.shell("grep CapEff /proc/self/status").split()[1] != "0" * 16
