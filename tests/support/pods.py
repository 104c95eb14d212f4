"""Basic configurations of pods and containers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from proto.runtime.v1 import cri_pb2
from tests.support.agent import BUSYBOX, AgentProcess, wait_for
from tests.support.cri import CriClient

_numbers = itertools.count(1)


def sandbox_config(agent: AgentProcess, name: str = "", **fields: Any) -> cri_pb2.PodSandboxConfig:
    """A pod as kubelet configures it: a PID namespace per container, and a log folder."""
    name = name or f"pod{next(_numbers)}"
    config = cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(name=name, namespace="default", uid=f"uid-{name}"),
        hostname=name,
        log_directory=str(agent.logs / name),
        **fields,
    )
    if not config.linux.security_context.HasField("namespace_options"):
        config.linux.security_context.namespace_options.pid = cri_pb2.CONTAINER
    return config


def container_config(name: str, *command: str, image: str = BUSYBOX, **fields: Any) -> cri_pb2.ContainerConfig:
    """A container that runs ``command`` and has a log."""
    config = cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=name),
        image=cri_pb2.ImageSpec(image=image),
        command=command,
        log_path=f"{name}/0.log",
        **fields,
    )
    if not config.linux.security_context.HasField("namespace_options"):
        config.linux.security_context.namespace_options.pid = cri_pb2.CONTAINER
    return config


def shared_pids(config: cri_pb2.ContainerConfig | cri_pb2.PodSandboxConfig) -> None:
    """Make a pod's containers share one PID namespace."""
    config.linux.security_context.namespace_options.pid = cri_pb2.POD


def run_container(agent: AgentProcess, *command: str, name: str = "main", **fields: Any) -> tuple[str, str]:
    """Run a new pod with one container. Returns their ids."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config(name, *command, **fields), sandbox)
    agent.client.start(container_id)
    return sandbox_id, container_id


# Exits with 3 on SIGTERM. A first process ignores signals until it has set a trap.
POLITE = ("sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")


def wait_for_log(client: CriClient, container_id: str, line: str = "ready") -> None:
    """Wait until a container has logged ``line``."""
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.exists() and line in log_lines(path), what=f"log line {line!r}")


def log_lines(path: str | Path) -> list[str]:
    """The texts of a CRI log without stream and time, with parts joined, and without an unfinished line."""
    lines, part = [], ""
    content = Path(path).read_text()
    for line in content[: content.rfind("\n") + 1].splitlines():
        _, _, tag, text = line.split(" ", 3)
        part += text
        if tag == "F":
            lines.append(part)
            part = ""
    return lines


def remove_all_pods(client: CriClient, *, keep: str = "") -> None:
    """Remove every sandbox except ``keep``."""
    for sandbox in client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items:
        if sandbox.id == keep:
            continue
        client.stop_sandbox(sandbox.id)
        client.remove_sandbox(sandbox.id)
