"""Refuses pods that cannot be checkpointed, before anything is frozen, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from host.errors import InvalidArgumentError, UnsupportedError, WrongStateError
from host.files import procfs
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.checkpoint.capture import require_running
from runtime.checkpoint.pod.options import LEAVE_OUT, SESSIONS
from runtime.oci.oci_runtime import OciRuntime
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.state import State

_DEEPEST = 100_000  # ancestors of a process that are checked


def selected(state: State, sandbox: Sandbox, container_ids: Sequence[str]) -> list[Container]:
    """The containers with these ids.

    Raises InvalidArgumentError, NotFoundError; WrongStateError if one does not run.
    """
    if not container_ids:
        raise InvalidArgumentError(f"{sandbox.title}: container_ids is empty: name the containers to be checkpointed")
    containers: list[Container] = []
    for container_id in container_ids:
        container = state.get_container(container_id)
        if container.sandbox is not sandbox:
            raise InvalidArgumentError(f"{container.title} does not belong to {sandbox.title}")
        if container in containers:
            raise InvalidArgumentError(f"{sandbox.title}: container_ids names {container.title} twice")
        containers.append(container)
    for container in containers:
        require_running(container)
    return containers


def require_able(sandbox: Sandbox, containers: Iterable[Container], runtime: OciRuntime) -> None:
    """Raise WrongStateError for a pod that cannot be saved, UnsupportedError for a handler that cannot restore it."""
    if sandbox.record.state is not SandboxState.READY or sandbox.closing:
        raise WrongStateError(f"{sandbox.title} is not ready: only a ready pod can be checkpointed")
    if not runtime.features.is_crun:
        raise UnsupportedError(
            f"{sandbox.title}: its runtime handler {runtime.name!r} could not restore it: pods need crun"
        )
    options = sandbox.namespace_options
    for obstacle, there in (
        ("uses the network of the node", sandbox.host_network),
        ("has a user namespace", sandbox.user_namespace),
        ("uses the PID namespace of the node", options.pid == cri_pb2.NODE),
        ("uses the IPC namespace of the node", options.ipc == cri_pb2.NODE),
    ):
        if there:
            raise WrongStateError(f"{sandbox.title} {obstacle}: such a pod cannot be checkpointed")
    for container in containers:
        pid = container.config.linux.security_context.namespace_options.pid
        if container.config.tty:
            raise WrongStateError(f"{container.title} has a terminal: it cannot be checkpointed")
        if pid in (cri_pb2.NODE, cri_pb2.TARGET):
            raise WrongStateError(f"{container.title} uses a PID namespace that is not its pod's: it cannot be saved")


def refuse_sessions(sandbox: Sandbox, containers: Iterable[Container], *, leave_out: bool) -> None:
    """Raise WrongStateError for a command of exec in a container, and for attached clients and port forwards unless
    they are left out. Blocks.
    """
    for container in containers:
        if any(container.folder.path.glob("exec-*.pid")):
            raise WrongStateError(
                f"{container.title}: a command of exec runs in it, which cannot be saved: wait for its end"
            )
        if container.attached and not leave_out:
            raise WrongStateError(f"{container.title} has attached clients: {_remedy()}")
    if sandbox.port_forwards and not leave_out:
        raise WrongStateError(f"{sandbox.title} has port forwards: {_remedy()}")


def refuse_outsiders(containers: Iterable[Container], cgroups: CgroupTree) -> None:
    """Raise WrongStateError for a process in a frozen container that does not descend from its first one. Blocks."""
    for container in containers:
        init = container.record.init
        known = {init.pid} if init is not None else set()
        for pid in cgroups.processes(container.record.cgroup):
            if not _descends(pid, known):
                name = procfs.read_bounded(f"/proc/{pid}/comm", 64).decode(errors="replace").strip()
                raise WrongStateError(
                    f"{container.title}: process {pid} ({name!a}) in it does not descend from its first process, "
                    "as a command of exec: it cannot be saved: wait for its end, or end it"
                )


def _descends(pid: int, known: set[int]) -> bool:
    """Whether a process is one of ``known`` or descends from one. All such processes are added to ``known``."""
    line: list[int] = []
    current: int | None = pid
    while current and current not in known and len(line) < _DEEPEST:
        line.append(current)
        current = procfs.parent_of(current)
    if not current or current not in known:
        return False
    known.update(line)
    return True


def _remedy() -> str:
    return f"they cannot be saved: end them, or leave them out with the option {SESSIONS}={LEAVE_OUT}"
