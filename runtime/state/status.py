"""The CRI's statuses and list items of sandboxes and containers, from memory."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable

from proto.runtime.v1 import cri_pb2
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState

_CONTAINER_STATES = {
    ContainerState.CREATED: cri_pb2.CONTAINER_CREATED,
    ContainerState.RUNNING: cri_pb2.CONTAINER_RUNNING,
    ContainerState.EXITED: cri_pb2.CONTAINER_EXITED,
}


def sandbox_state(sandbox: Sandbox) -> cri_pb2.PodSandboxState:
    """Ready or not."""
    ready = sandbox.record.state is SandboxState.READY
    return cri_pb2.SANDBOX_READY if ready else cri_pb2.SANDBOX_NOTREADY


def container_state(container: Container) -> cri_pb2.ContainerState:
    """The CRI's state. It is unknown for a container that is being created or removed."""
    return _CONTAINER_STATES.get(container.record.state, cri_pb2.CONTAINER_UNKNOWN)


def sandbox_status(sandbox: Sandbox) -> cri_pb2.PodSandboxStatus:
    """PodSandboxStatus; created_at in nanoseconds."""
    config, record = sandbox.config, sandbox.record
    status = cri_pb2.PodSandboxStatus(
        id=sandbox.id,
        metadata=config.metadata,
        state=sandbox_state(sandbox),
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.requested_handler,
        network=cri_pb2.PodSandboxNetworkStatus(),
    )
    status.linux.namespaces.options.CopyFrom(sandbox.namespace_options)
    if record.addresses and record.state is SandboxState.READY:
        status.network.ip = record.addresses[0]
        for address in record.addresses[1:]:
            status.network.additional_ips.add(ip=address)
    return status


def sandbox_item(sandbox: Sandbox) -> cri_pb2.PodSandbox:
    """The item of ListPodSandbox."""
    config = sandbox.config
    return cri_pb2.PodSandbox(
        id=sandbox.id,
        metadata=config.metadata,
        state=sandbox_state(sandbox),
        created_at=sandbox.record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=sandbox.record.requested_handler,
    )


def container_item(container: Container) -> cri_pb2.Container:
    """The item of ListContainers."""
    config, record = container.config, container.record
    return cri_pb2.Container(
        id=container.id,
        pod_sandbox_id=container.sandbox.id,
        metadata=config.metadata,
        image=_asked_image(config.image),
        image_ref=record.image_ref,
        image_id=record.image_id,
        state=container_state(container),
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
    )


def container_status(container: Container) -> cri_pb2.ContainerStatus:
    """ContainerStatus. Times are in nanoseconds; 0 for what has not happened."""
    config, record = container.config, container.record
    status = cri_pb2.ContainerStatus(
        id=container.id,
        metadata=config.metadata,
        state=container_state(container),
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        image=_asked_image(config.image),
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=record.reason,
        message=record.message,
        labels=config.labels,
        annotations=config.annotations,
        mounts=[cri_pb2.Mount.FromString(mount) for mount in record.mounts],
        log_path=record.log_path,
        stop_signal=cri_pb2.Signal.Name(signal_value(record.stop_signal)),
    )
    status.resources.linux.ParseFromString(record.resources)
    uid, gid, groups = record.user
    status.user.linux.CopyFrom(cri_pb2.LinuxContainerUser(uid=uid, gid=gid, supplemental_groups=groups))
    return status


def event(
    kind: cri_pb2.ContainerEventType, object_id: str, sandbox: Sandbox, containers: Iterable[Container]
) -> cri_pb2.ContainerEventResponse:
    """An event of a sandbox or one of its containers, with the present statuses."""
    return cri_pb2.ContainerEventResponse(
        container_id=object_id,
        container_event_type=kind,
        created_at=time.time_ns(),
        pod_sandbox_status=sandbox_status(sandbox),
        containers_statuses=[container_status(container) for container in containers if container.visible],
    )


def signal_value(number: int) -> int:
    """The CRI's value of a signal number."""
    low, high = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    if low <= number <= high:
        middle = low + (high - low) // 2
        if number <= middle:
            name = f"SIGRTMINPLUS{number - low}" if number > low else "SIGRTMIN"
        else:
            name = f"SIGRTMAXMINUS{high - number}" if number < high else "SIGRTMAX"
    else:
        name = signal.Signals(number).name
    return cri_pb2.Signal.Value(f"SIGNAL_{name}")


def _asked_image(image: cri_pb2.ImageSpec) -> cri_pb2.ImageSpec:
    """The requested image: kubelet resolves names to ids first and also keeps the name."""
    answer = cri_pb2.ImageSpec()
    answer.CopyFrom(image)
    if image.user_specified_image:
        answer.image = image.user_specified_image
    return answer
