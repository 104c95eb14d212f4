"""The device that hides files in /proc from a container is not the node's, and no container can change it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import grpc
import pytest

from host.files.mounts import mount_table
from tests.integration.agent.hardening import Attacker, init_pid, like_kubelets, with_python
from tests.security.conftest import StartAttacker, pod_config
from tests.support.agent import AgentProcess, wait_for

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
    for flags in %r:
        call(165, b"none", target.encode(), None, MS_REMOUNT | flags, None)
        found += changes(HIDDEN)
call(166, HIDDEN.encode(), 2)
answer(found)
"""


@pytest.mark.parametrize("how", ["as it is", "unshared", "SYS_ADMIN"])
def test_the_device_that_hides_files_cannot_be_changed(
    quiet_log: AgentProcess, attacker: StartAttacker, handler: str, user_namespace: bool, how: str
) -> None:
    before = Path("/dev/null").stat()
    config = with_python(like_kubelets("main"))
    if how == "SYS_ADMIN":
        config.linux.security_context.capabilities.add_capabilities.append("SYS_ADMIN")
    found = attacker(config).python(f"HIDDEN = {HIDDEN!r}\n" + CHANGES % (how == "unshared", (4096, 0)))
    after = Path("/dev/null").stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_mtime > 1
    if handler == "crun":  # runc uses the container's own device, which its root may change
        assert set(found) <= {"EROFS", "EPERM", "EINVAL"}


def of_the_node() -> set[tuple[int, int]]:
    """Every file of the node's /dev, with its mount."""
    found = set()
    for folder, _, files in os.walk("/dev"):
        for name in files:
            with contextlib.suppress(OSError):
                status = Path(folder, name).lstat()
                found.add((status.st_dev, status.st_ino))
    return found


def held_by(pid: int) -> dict[str, tuple[int, int]]:
    """The mounts and open files of a process."""
    process = Path(f"/proc/{pid}")
    paths = [process / f"root{entry.target}" for entry in mount_table(str(process / "mountinfo"))]
    paths += [
        *(process / "fd").iterdir(),
        *(path for path in (process / "root/dev").iterdir() if not path.is_symlink()),
    ]
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):  # hidden by a later mount
            status = path.stat()
            found[str(path)] = (status.st_dev, status.st_ino)
    return found


def test_no_container_holds_a_file_of_the_node_s_dev(
    quiet_log: AgentProcess, attacker: StartAttacker, tmp_path: Path
) -> None:
    """Hides files in /proc, in the image and in a volume."""
    tmp_path.chmod(0o777)
    (tmp_path / "secret").write_text("secret")
    config = like_kubelets("main")
    config.mounts.add(container_path="/volume", host_path=str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/secret").touch()
    more = ["/etc/passwd", "/volume/secret", "/volume/folder", "/proc/self/environ", "/none", "/dev/zero", "/dev/shm"]
    config.linux.security_context.masked_paths.extend(more)
    ours = attacker(config)
    process = init_pid(quiet_log, ours.container_id)
    wait_for(lambda: Path(f"/proc/{process}/comm").read_text() == "sleep\n", what="the runtime's last step")
    held = held_by(process)
    assert f"/proc/{process}/root{HIDDEN}" in held
    assert {path: file for path, file in held.items() if file in of_the_node()} == {}
    assert ours.shell("ls /volume/folder; touch /volume/folder/file").startswith("touch: ")
    hidden = f"for file in {HIDDEN} /etc/passwd /volume/secret; do wc -c < $file; echo lost > $file; done"
    assert ours.shell(hidden).split() == ["0", "0", "0"]
    assert (tmp_path / "secret").read_text() == "secret"


def test_files_are_hidden_also_after_the_agent_was_killed(own_agent: AgentProcess) -> None:
    """Files stay hidden in running containers, and are hidden in new ones."""
    for _ in range(2):
        sandbox = pod_config(own_agent)
        sandbox_id = own_agent.client.run_sandbox(sandbox, "crun")
        config = like_kubelets("main")
        ours = Attacker(own_agent, sandbox, sandbox_id, own_agent.client.create(sandbox_id, config, sandbox))
        own_agent.client.start(ours.container_id)
        assert ours.shell(f"wc -c < {HIDDEN}").strip() == "0"
        own_agent.kill()
        own_agent.start()
        assert ours.shell(f"wc -c < {HIDDEN}").strip() == "0"
    mask = [entry for entry in mount_table() if entry.target == f"{own_agent.run}/mask"]
    assert len(mask) == 1
    own_agent.stop()
    assert [entry for entry in mount_table() if entry.target == f"{own_agent.run}/mask"] == []
    own_agent.start()


def test_a_path_of_proc_that_only_the_pod_has_is_refused(agent: AgentProcess) -> None:
    """crun would hide it with the node's null device. The agent cannot check the path, so it refuses it."""
    sandbox = pod_config(agent)
    config = like_kubelets("main")
    path = "/proc/self/task/1/environ"  # of the thread of process 1, which is never an agent in these tests
    config.linux.security_context.masked_paths.append(path)
    with pytest.raises(grpc.RpcError, match=path) as refused:
        agent.client.create(agent.client.run_sandbox(sandbox, "crun"), config, sandbox)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
