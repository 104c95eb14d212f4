"""Configurations of pods and containers that tests begin with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from proto.runtime.v1 import cri_pb2
from tests.support.agent import BUSYBOX, AgentProcess, wait_for
from tests.support.cri import CriClient

_numbers = itertools.count(1)


def sandbox_config(agent: AgentProcess, name: str = "", **fields: Any) -> cri_pb2.PodSandboxConfig:
    """A pod as kubelet makes them: a PID namespace per container, logs in a separate folder."""
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
    """A container that runs ``command``, with a log."""
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
    """Have a pod's containers share one PID namespace."""
    config.linux.security_context.namespace_options.pid = cri_pb2.POD


def run_container(agent: AgentProcess, *command: str, name: str = "main", **fields: Any) -> tuple[str, str]:
    """A new pod with one started container; their ids."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config(name, *command, **fields), sandbox)
    agent.client.start(container_id)
    return sandbox_id, container_id


# Exits with 3 when it is asked to end; a first process ignores signals that it has not set a trap for yet.
POLITE = ("sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")


def wait_for_log(client: CriClient, container_id: str, line: str = "ready") -> None:
    """Wait until a container has logged ``line``."""
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.exists() and line in log_lines(path), what=f"log line {line!r}")


def log_lines(path: str | Path) -> list[str]:
    """The texts of a CRI log, stream and time taken away, parts joined; no line that is just being written."""
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
    """Remove every sandbox but ``keep``."""
    for sandbox in client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items:
        if sandbox.id == keep:
            continue
        client.stop_sandbox(sandbox.id)
        client.remove_sandbox(sandbox.id)
