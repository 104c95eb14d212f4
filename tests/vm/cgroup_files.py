"""What the kernel and systemd say of a container's cgroup."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from proto.runtime.v1 import cri_pb2
from runtime.cgroups.slices import slice_name, slice_path
from tests.support.cri import CriClient

CGROUPS = Path("/sys/fs/cgroup")


def information(client: CriClient, container_id: str) -> dict[str, Any]:
    """What the agent reports about a container besides its status."""
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    told: dict[str, Any] = json.loads(client.call("ContainerStatus", request).info["info"])
    return told


def cgroup_of(client: CriClient, container_id: str) -> Path:
    """The folder of the cgroup that the container's first process is in."""
    pid = information(client, container_id)["pid"]
    return CGROUPS / Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("::/")[2]


def pod_folder(client: CriClient, sandbox_id: str) -> Path:
    """The folder of the pod's cgroup."""
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
    parent = json.loads(client.call("PodSandboxStatus", request).info["info"])["cgroupParent"]
    path = slice_path(slice_name(parent)) if parent.endswith(".slice") else parent
    return CGROUPS / path.lstrip("/")


def content(folder: Path, name: str) -> str:
    """A file of a cgroup."""
    return (folder / name).read_text().strip()


def properties(unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit, from systemd."""
    command = ["systemctl", "show", unit, *(f"--property={name}" for name in names)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)
