"""A container that swaps a folder of a volume cannot make another one's volume be mounted over its devices."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from host.files.mounts import mount_table
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import PRELUDE, PYTHON, init_pid, like_kubelets, with_python
from tests.security.conftest import pod_config
from tests.support.agent import PATIENCE, AgentProcess, wait_for

# Swaps a mount point in the volume with a link to the devices, as fast as it can.
SWAP = """
os.mkdir("/volume/inner")
os.symlink("{target}", "/volume/link")
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    libc.renameat2(-100, b"/volume/inner", -100, b"/volume/link", 2)
"""


@pytest.mark.parametrize("target", ["/dev", "/"])
def test_no_volume_is_mounted_over_devices_while_its_mount_point_is_swapped(
    quiet_log: AgentProcess, handler: str, tmp_path: Path, target: str
) -> None:
    """OCI runtimes would open its null and terminals as root, for the container that starts then."""
    volume, other = tmp_path / "volume", tmp_path / "other"
    for folder in (volume, other):
        folder.mkdir()
    (other / "null").symlink_to("/proc/sys/kernel/core_pattern")
    code = PRELUDE + SWAP.format(target=target, seconds=10 * PATIENCE)
    swapper = with_python(like_kubelets("swapper", PYTHON, "-I", "-c", code))
    sandbox = pod_config(quiet_log)
    sandbox_id = quiet_log.client.run_sandbox(sandbox, handler)
    swapper.mounts.add(container_path="/volume", host_path=str(volume))
    quiet_log.client.start(quiet_log.client.create(sandbox_id, swapper, sandbox))
    wait_for(lambda: (volume / "inner").is_symlink() or (volume / "link").is_symlink(), what="the first swap")
    outcomes = set()
    for number in range(20):
        victim = like_kubelets(f"victim{number}")
        victim.mounts.add(container_path="/volume", host_path=str(volume))
        victim.mounts.add(container_path="/volume/inner", host_path=str(other))
        try:
            container_id = quiet_log.client.create(sandbox_id, victim, sandbox)
        except grpc.RpcError:
            outcomes.add("refused")
            continue
        table = list(mount_table(f"/proc/{init_pid(quiet_log, container_id)}/mountinfo"))
        places = {entry.target for entry in table if entry.root.endswith("/other")}
        assert places
        assert places <= {"/volume/inner", "/volume/link"}  # the mount moves when the folder is renamed
        quiet_log.client.remove(container_id)
    assert "refused" in outcomes, "the swaps were never seen"


def test_mounts_inside_volumes_are_not_treated_as_swapped(
    quiet_log: AgentProcess, handler: str, tmp_path: Path
) -> None:
    """A volume inside another one, beside a terminal, a volume in /dev, and one with a mount in it."""
    volume, other = tmp_path / "volume", tmp_path / "other"
    for folder in (volume / "inner", other):
        folder.mkdir(parents=True)
    config = like_kubelets("main", tty=True)
    for place, source in (
        ("/volume", volume),
        ("/volume/inner", other),
        ("/dev/volume", volume),
        ("/dev/mqueue", other),
    ):
        config.mounts.add(container_path=place, host_path=str(source))
    config.mounts.add(container_path="/dev/hugepages", host_path="/dev", readonly=True)
    sandbox = pod_config(quiet_log)
    container_id = quiet_log.client.create(quiet_log.client.run_sandbox(sandbox, handler), config, sandbox)
    quiet_log.client.start(container_id)
    assert quiet_log.client.output(container_id, "ls", "/volume", "/dev/volume").split().count("inner") == 2


@pytest.mark.parametrize("target", ["/dev", "/etc"])
def test_a_swapped_mount_point_changes_no_owner_of_the_node_s_files(
    quiet_log: AgentProcess, handler: str, tmp_path: Path, target: str
) -> None:
    """With host PID, a null in the volume can link to any file of the node, which the OCI runtime would chown."""
    volume, other, secret = tmp_path / "volume", tmp_path / "other", tmp_path / "secret"
    for folder in (volume, other):
        folder.mkdir()
    secret.touch(mode=0o600)
    (other / "null").symlink_to(f"/proc/{os.getpid()}/root{secret}")
    (other / "inner").symlink_to("/dev/null")
    sandbox = pod_config(quiet_log)
    sandbox.linux.security_context.namespace_options.pid = cri_pb2.NODE
    sandbox_id = quiet_log.client.run_sandbox(sandbox, handler)
    code = PRELUDE + SWAP.format(target=target, seconds=30 * PATIENCE)
    swapper = with_python(like_kubelets("swapper", PYTHON, "-I", "-c", code))
    swapper.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    swapper.mounts.add(container_path="/volume", host_path=str(volume))
    swapping = quiet_log.client.create(sandbox_id, swapper, sandbox)
    quiet_log.client.start(swapping)
    wait_for(lambda: (volume / "inner").is_symlink() or (volume / "link").is_symlink(), what="the first swap")
    outcomes = set()
    for number in range(15):
        victim = like_kubelets(f"victim{number}")
        victim.linux.security_context.run_as_user.value = 1000
        victim.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
        victim.mounts.add(container_path="/volume", host_path=str(volume))
        victim.mounts.add(container_path="/volume/inner", host_path=str(other))
        if target == "/etc":  # and by a second volume, in the wrong place
            victim.mounts.add(container_path="/etc/inner", host_path=str(secret))
        try:
            quiet_log.client.remove(quiet_log.client.create(sandbox_id, victim, sandbox))
            outcomes.add("created")
        except grpc.RpcError:
            outcomes.add("refused")
        assert secret.stat().st_uid == 0, f"the node's file has another owner after {number} tries"
        assert secret.stat().st_mode & 0o777 == 0o600
    assert ("refused" in outcomes) or target == "/etc", "the swaps were never seen"
    quiet_log.client.remove(swapping)
