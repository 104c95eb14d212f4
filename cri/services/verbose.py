"""The ``info`` of verbose answers, beyond the CRI's fields: plain values, ready to be encoded as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from cri.version import VERSION
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.agent import Agent
from runtime.layout import SandboxFolder
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox

_OCI_NAMESPACES = {"net": "network"}


def node_information(agent: Agent) -> dict[str, Any]:
    """For Status: the agent's configuration, runtimes, network and plugins."""
    handlers = {
        handler.name: {"program": handler.program, "features": msgspec.structs.asdict(handler.features)}
        for handler in agent.handlers.working()
    }
    return {
        "config": {"runtime": msgspec.structs.asdict(agent.options)},
        "podkeel": {
            "version": VERSION,
            "cgroupVersion": agent.cgroups.version,
            "cgroupDriver": agent.cgroups.driver,
            "handlers": handlers,
            "failedHandlers": agent.handlers.failures,
            "failedHooks": agent.hooks_dir.problems,
            "checkpoint": agent.checkpoints.support.report(),
            "nri": agent.hooks.service(),
            "nriPlugins": agent.hooks.report(),
            "sandboxes": len(agent.state.sandboxes),
            "containers": len(agent.state.containers),
            "storeCommits": agent.database.commits,
            "writableLayers": {
                "projectQuotas": agent.images.snapshots.project_quotas,
                "countedBecause": agent.images.snapshots.writable.counted_because,
            },
        },
    }


def sandbox_information(agent: Agent, sandbox: Sandbox) -> dict[str, Any]:
    """For PodSandboxStatus."""
    record = sandbox.record
    folder = sandbox.folder
    return {
        "pid": _a_pid_in(agent, sandbox),
        "state": str(record.state),
        "runtimeHandler": record.handler,
        "cgroupParent": record.cgroup_parent,
        "networkNamespace": "" if sandbox.host_network else str(folder.pin("net")),
        # Scripts that use crictl look here for a pod's namespaces, as if it had a pause container.
        "runtimeSpec": {"linux": {"namespaces": _namespaces(folder)}},
        "addresses": list(record.addresses),
        "resources": _resources(record.resources),
        "overhead": _resources(record.overhead),
        "checkpointing": _checkpointing(agent, sandbox),
        "operations": operations(sandbox.operations),
    }


def _checkpointing(agent: Agent, sandbox: Sandbox) -> list[str]:
    """Names of the containers that are being checkpointed."""
    containers = agent.state.containers_of(sandbox)
    return [container.config.metadata.name for container in containers if container.checkpoint is not None]


def _resources(encoded: bytes) -> dict[str, Any]:
    """The pod's resource limits by the CRI's names, without those that are not set."""
    message = cri_pb2.LinuxContainerResources.FromString(encoded)
    numbers = {field.name: value for field, value in message.ListFields() if isinstance(value, int | str)}
    return {"linux": numbers}


def _a_pid_in(agent: Agent, sandbox: Sandbox) -> int:
    """A process in the pod's namespaces (``nsenter --target``), of its oldest running container; 0 if none runs."""
    running = (c for c in agent.state.containers_of(sandbox) if c.record.state is ContainerState.RUNNING)
    return next((container.record.init.pid for container in running if container.record.init), 0)


def _namespaces(folder: SandboxFolder) -> list[dict[str, str]]:
    """The pinned namespaces, in the form of the OCI runtime specification."""
    pins = [(_OCI_NAMESPACES.get(kind, kind), folder.pin(kind)) for kind in ("net", "ipc", "uts", "pid", "user")]
    return [{"type": name, "path": str(pin)} for name, pin in pins if pin.exists()]


def container_information(agent: Agent, container: Container) -> dict[str, Any]:
    """For ContainerStatus."""
    record = container.record
    folder = container.folder
    try:
        spec: Any = msgspec.json.decode(folder.spec.read_bytes())
    except OSError:
        spec = None
    return {
        "sandboxID": container.sandbox.id,
        "pid": record.init.pid if record.init and not container.exited.is_set() else 0,
        "conmonPid": record.monitor.pid if record.monitor and not container.exited.is_set() else 0,
        "state": str(record.state),
        "runtimeHandler": record.handler,
        "cgroup": record.cgroup,
        "bundle": str(folder.path),
        "rootfs": str(folder.rootfs),
        "runtimeSpec": spec,
        "changedBy": record.changed_by,
        "checkpointing": container.checkpoint is not None,
        "operations": operations(container.operations),
    }


def operations(kept: list[Operation]) -> list[dict[str, Any]]:
    """Stages with start (nanoseconds since the epoch) and seconds, None while one runs."""
    return [
        {
            "name": operation.name,
            "started": operation.started,
            "stages": [
                {"name": stage.name, "started": stage.started, "seconds": stage.seconds, "failed": stage.failed}
                for stage in operation.stages
            ],
        }
        for operation in kept
    ]
