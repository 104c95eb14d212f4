"""What the end of a container costs those who wait for the loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from host.processes import start_time
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.containers.endings.exit import ContainerExit
from runtime.layout import ContainerFolder, SandboxFolder
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState


def _container() -> Container:
    record = ContainerRecord(
        state=ContainerState.EXITED, created_at=0, handler="crun", boot_id="b", image_id="", image_ref="", cgroup="/c"
    )
    sandbox = SandboxRecord(state=SandboxState.READY, created_at=0, handler="crun", requested_handler="", boot_id="b")
    pod = Sandbox("s", cri_pb2.PodSandboxConfig(), sandbox, SandboxFolder(Path("/run/s")))
    return Container("c", pod, cri_pb2.ContainerConfig(), record, ContainerFolder(Path("/run/c")))


def _exits(cgroups: CgroupTree, runtime: SimpleNamespace) -> ContainerExit:
    handlers: Any = SimpleNamespace(find=lambda name: runtime)
    state: Any = SimpleNamespace(boot_id="b")
    unused: Any = None
    return ContainerExit(
        state=state,
        handlers=handlers,
        monitors=unused,
        cgroups=cgroups,
        rootfs=unused,
        meters=unused,
        hooks=unused,
    )


def test_a_container_with_many_cgroups_does_not_hold_the_loop(tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / "c" / f"nested{number}").mkdir(parents=True)
    runtime = SimpleNamespace(root=tmp_path / "oci")
    cgroups = CgroupTree(1, "cgroupfs", {"pids": tmp_path})
    exits = _exits(cgroups, runtime)
    turns = 0

    async def body() -> None:
        nonlocal turns
        releasing = asyncio.ensure_future(exits.release_runtime(_container()))
        while not releasing.done():
            await asyncio.sleep(0)
            turns += 1
        await releasing

    asyncio.run(body())
    assert not (tmp_path / "c").exists()
    assert turns > 2


def test_a_cgroup_is_removed_only_when_its_processes_have_ended(tmp_path: Path) -> None:
    (tmp_path / "freezer/c").mkdir(parents=True)  # the OCI runtime may have got no further than one hierarchy
    (tmp_path / "pids").mkdir()
    cgroups = CgroupTree(1, "cgroupfs", {"pids": tmp_path / "pids", "freezer": tmp_path / "freezer"})
    runtime = SimpleNamespace(root=tmp_path / "oci")
    exits = _exits(cgroups, runtime)
    # What has much memory takes a while to end.
    command = [sys.executable, "-c", "x = bytearray(1 << 28); print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as member:
        assert member.stdout is not None
        member.stdout.readline()
        (tmp_path / "freezer/c/cgroup.procs").write_text(f"{member.pid}\n")
        asyncio.run(exits.release_runtime(_container()))
        assert start_time(member.pid) is None
