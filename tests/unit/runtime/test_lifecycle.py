"""What the end of a container costs those who wait for the loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from proto.runtime.v1 import cri_pb2
from runtime.cgroups import CgroupTree
from runtime.container import Container, ContainerRecord, ContainerState
from runtime.lifecycle import Lifecycle
from runtime.sandbox import Sandbox, SandboxRecord, SandboxState


def _container() -> Container:
    record = ContainerRecord(
        state=ContainerState.EXITED, created_at=0, handler="crun", boot_id="b", image_id="", image_ref="", cgroup="/c"
    )
    sandbox = SandboxRecord(state=SandboxState.READY, created_at=0, handler="crun", requested_handler="", boot_id="b")
    return Container("c", Sandbox("s", cri_pb2.PodSandboxConfig(), sandbox), cri_pb2.ContainerConfig(), record)


def test_a_container_with_many_cgroups_does_not_hold_the_loop(tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / "c" / f"nested{number}").mkdir(parents=True)
    runtime = SimpleNamespace(root=tmp_path / "oci")
    cgroups = CgroupTree(1, "cgroupfs", {"pids": tmp_path})
    node: Any = SimpleNamespace(boot_id="b", cgroups=cgroups, handlers=SimpleNamespace(find=lambda name: runtime))
    turns = 0

    async def body() -> None:
        nonlocal turns
        releasing = asyncio.ensure_future(Lifecycle(node).release_runtime(_container()))
        while not releasing.done():
            await asyncio.sleep(0)
            turns += 1
        await releasing

    asyncio.run(body())
    assert not (tmp_path / "c").exists()
    assert turns > 2
