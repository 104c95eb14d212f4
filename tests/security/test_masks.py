"""Nobody changes a device of the node's by what hides files of /proc: crun takes the node's null device for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.agent.hardening import like_kubelets, with_python
from tests.security.conftest import StartAttacker
from tests.support.agent import AgentProcess

HIDDEN = "/proc/keys"

CHANGES = """
MS_REMOUNT, MS_BIND, NEW = 32, 4096, 0x10000000 | 0x20000
if %r:
    assert call(272, NEW) == "done"  # unshare of a user and a mount namespace, in which it has all capabilities
def changes(path):
    yield attempt(os.chmod, path, 0o640)
    yield attempt(os.chown, path, 7, 7)
    yield attempt(os.utime, path, (1, 1))
    yield attempt(os.setxattr, path, "user.mark", b"1")
found = [*changes(HIDDEN)]
for target in (HIDDEN, "/mnt"):
    call(165, HIDDEN.encode(), target.encode(), None, MS_BIND, None)
    call(165, b"none", target.encode(), None, MS_REMOUNT | MS_BIND, None)
    found += changes(HIDDEN)
call(166, HIDDEN.encode(), 2)
answer(found)
"""


@pytest.mark.parametrize("how", ["as it is", "unshared", "SYS_ADMIN"])
def test_what_hides_files_cannot_be_changed(
    quiet_log: AgentProcess, attacker: StartAttacker, handler: str, user_namespace: bool, how: str
) -> None:
    if how == "SYS_ADMIN" and not user_namespace:
        pytest.skip("SYS_ADMIN without a user namespace is to be taken for root on the node")
    before = Path("/dev/null").stat()
    config = with_python(like_kubelets("main"))
    if how == "SYS_ADMIN":
        config.linux.security_context.capabilities.add_capabilities.append("SYS_ADMIN")
    found = attacker(config).python(f"HIDDEN = {HIDDEN!r}\n" + CHANGES % (how == "unshared"))
    after = Path("/dev/null").stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_mtime > 1
    if handler == "crun":  # runc takes the container's own, which its root may change
        assert set(found) <= {"EROFS", "EPERM", "EINVAL"}
