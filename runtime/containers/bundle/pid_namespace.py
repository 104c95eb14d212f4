"""The PID namespace that a container joins: a new one, the pod's, another container's, or the node's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from host.concurrency.threads import in_fresh_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import InvalidArgumentError, WrongStateError
from host.processes import open_namespace
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.monitor_cgroup import MonitorCgroup
from runtime.namespaces.pid import end_holder, pin_holder, start_holder, start_holder_in_user_namespace
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox
from runtime.state.state import State


def pid_namespace(container: Container, target_pids: str | None) -> tuple[str | None, bool]:
    """The path of the PID namespace to join (None: a new one), and whether it is the node's."""
    sandbox = container.sandbox
    options = container.config.linux.security_context.namespace_options
    if options.pid == cri_pb2.NODE:
        return None, True
    if options.pid in (cri_pb2.CONTAINER, cri_pb2.TARGET):
        return target_pids, False
    if sandbox.namespace_options.pid == cri_pb2.NODE:
        return None, True
    return str(sandbox.folder.pin("pid")), False


def shares_pod_pids(container: Container) -> bool:
    """Whether a container joins the PID namespace that its pod shares."""
    mode = container.config.linux.security_context.namespace_options.pid
    return mode == cri_pb2.POD and container.sandbox.namespace_options.pid != cri_pb2.NODE


async def ensure_pid_holder(state: State, catatonit: str, cgroup: MonitorCgroup, sandbox: Sandbox) -> None:
    """Create the PID namespace that the pod's containers share, unless it exists."""
    async with sandbox.holder_lock:
        if sandbox.record.pid_holder is not None:
            return
        folder = sandbox.folder
        async with Undo(sandbox.title) as undo:
            undo.push("the init of its PID namespace", partial(in_thread, end_holder, None, folder, sandbox.id))
            start = start_holder_in_user_namespace if sandbox.user_namespace else start_holder
            pid = await in_fresh_thread(start, folder, catatonit, sandbox.id)
            if not await in_thread(cgroup.enter, pid):
                await cgroup.enter_again(pid)
            sandbox.record.pid_holder = await in_thread(pin_holder, folder, pid)
            undo.push("its record", partial(setattr, sandbox.record, "pid_holder", None))
            await state.save(sandbox)


@contextmanager
def target_pid_namespace(state: State, container: Container) -> Iterator[str | None]:
    """The path of the PID namespace of the container that ``container`` targets, for the block; None without a target.

    The path names a descriptor of the agent. With a path of the target's process, the OCI runtime could join the
    namespace of another process that has reused the pid. Raises InvalidArgumentError if the target is not a container
    of the pod, and WrongStateError if it does not run.
    """
    options = container.config.linux.security_context.namespace_options
    if options.pid != cri_pb2.TARGET:
        yield None
        return
    target = state.containers.find(options.target_id) if options.target_id else None
    if target is None or target.sandbox.id != container.sandbox.id or not target.visible:
        raise InvalidArgumentError(
            f"{container.title}: target_id {options.target_id!r} is not a container of its pod: name one of them"
        )
    init = target.record.init if target.record.state is ContainerState.RUNNING else None
    descriptor = open_namespace(init.pid, init.started, "pid") if init is not None else None
    if descriptor is None:
        raise WrongStateError(f"{container.title}: its target {target.title} is not running: start it first")
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
