"""Whether the kernel killed a container for want of memory, told also after its cgroup is gone."""

from __future__ import annotations

from runtime.node import Node
from runtime.oci.conmon import ExitRecord
from runtime.state.container import Container, ContainerState

KILLED_EXIT_CODE = 137  # 128 + SIGKILL


def killed_for_memory(node: Node, container: Container) -> bool:
    """Whether any process of a container that has ended was killed for a memory limit.

    systemd removes a scope the moment its last process ends, with its counters; those of the pod's cgroup remain, and
    on cgroup v2 they include what happened below. What neither the containers that live nor those that ended before
    explain was this container's. The pod's record keeps what is explained; the caller saves it if the answer is yes.
    """
    cgroups, sandbox = node.cgroups, container.sandbox
    if cgroups.version == 1 or _shares_its_parent(node, container):
        return cgroups.out_of_memory_kills(container.record.cgroup) > 0
    alive = (
        other.record.cgroup
        for other in node.containers_of(sandbox)
        if other is not container and other.record.state in (ContainerState.CREATED, ContainerState.RUNNING)
    )
    parent = cgroups.parent_path(sandbox.record.cgroup_parent)
    ended = cgroups.out_of_memory_kills(parent) - sum(map(cgroups.out_of_memory_kills, alive))
    if ended <= sandbox.record.oom_kills:
        return False
    sandbox.record.oom_kills = ended
    return True


def ended_by_the_kernel(container: Container, exit_record: ExitRecord | None) -> bool:
    """Whether the kernel's kill of a process of the container may be why it ended.

    It is where the first process was the one killed, or ended with the same code when it lost a child to it, as shells
    do. It is not where the program ended in its own way later, nor where the agent killed it. An end that was not
    recorded may have been one.
    """
    return not container.killed and (exit_record is None or exit_record.code == KILLED_EXIT_CODE)


def _shares_its_parent(node: Node, container: Container) -> bool:
    parent = container.sandbox.record.cgroup_parent
    others = (other.record for other in node.sandboxes if other is not container.sandbox)
    return any(record.cgroup_parent == parent and not record.torn_down for record in others)
