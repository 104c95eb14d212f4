"""The processor time that says whether a container may have written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from metrics.meters import Meters
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.layout import ContainerFolder
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.sandbox import Sandbox
from runtime.statistics import Statistics
from tests.unit.metrics import trees


@pytest.fixture
def container() -> Container:
    record = ContainerRecord(ContainerState.RUNNING, 1, "crun", "boot", "image", "image", "/pod/container")
    return Container("c" * 64, cast(Sandbox, None), cri_pb2.ContainerConfig(), record, ContainerFolder(Path("/run/c")))


def test_processor_time_is_known_only_with_a_private_pid_namespace(container: Container, tmp_path: Path) -> None:
    hierarchies = trees.make_v2(tmp_path, container.record.cgroup)
    meters, unused = Meters(hierarchies), cast(Any, SimpleNamespace(writable=None))
    of_node = Statistics(unused, CgroupTree(2, "cgroupfs"), meters, unused, tmp_path)
    assert of_node.processor_time(container) == 12_345_678_000
    container.record.private_pid_namespace = False
    assert of_node.processor_time(container) is None, "who sees its processes may write in its files"
    container.record.private_pid_namespace = True
    meters.forget(container.id)
    shutil.rmtree(tmp_path / "pod")
    assert of_node.processor_time(container) is None, "nobody knows"
    container.record.state = ContainerState.EXITED
    assert of_node.processor_time(container) == -1
