"""The allowed changes of state of sandboxes and containers, and the fields of the log line of a change."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from host.errors import WrongStateError
from host.stages import Operation
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState

# A stop that failed halfway is repeated: it writes the same state again. After a failed removal, the state of before
# returns, so that clients see the object and can try again. If the creation of a sandbox or container fails, it has no
# next state: its row is deleted.
_SANDBOX: Mapping[SandboxState, frozenset[SandboxState]] = {
    SandboxState.MAKING: frozenset({SandboxState.READY}),
    SandboxState.READY: frozenset({SandboxState.NOT_READY, SandboxState.REMOVING}),
    SandboxState.NOT_READY: frozenset({SandboxState.NOT_READY, SandboxState.REMOVING}),
    SandboxState.REMOVING: frozenset({SandboxState.NOT_READY}),
}
_CONTAINER: Mapping[ContainerState, frozenset[ContainerState]] = {
    ContainerState.MAKING: frozenset({ContainerState.CREATED}),
    ContainerState.CREATED: frozenset({ContainerState.RUNNING, ContainerState.EXITED}),
    ContainerState.RUNNING: frozenset({ContainerState.EXITED}),
    ContainerState.EXITED: frozenset({ContainerState.REMOVING}),
    ContainerState.REMOVING: frozenset({ContainerState.EXITED}),
}


def check_sandbox_move(sandbox: Sandbox, to: SandboxState) -> None:
    """Raise WrongStateError if a sandbox cannot change to the state ``to`` from its present one."""
    if to not in _SANDBOX[sandbox.record.state]:
        raise WrongStateError(f"{sandbox.title} is {sandbox.record.state}: it cannot become {to}")


def check_container_move(container: Container, to: ContainerState) -> None:
    """Raise WrongStateError if a container cannot change to the state ``to`` from its present one."""
    if to not in _CONTAINER[container.record.state]:
        raise WrongStateError(f"{container.title} is {container.record.state}: it cannot become {to}")


def of_sandbox(sandbox: Sandbox, operation: Operation) -> dict[str, Any]:
    """The ``extra`` of a log line about a sandbox that ``operation`` changed."""
    metadata = sandbox.config.metadata
    return {
        "fields": {
            "namespace": metadata.namespace,
            "pod": metadata.name,
            "uid": metadata.uid,
            "sandbox": sandbox.id,
            "seconds": _since(operation.started),
        }
    }


def of_container(container: Container, operation: Operation | None = None) -> dict[str, Any]:
    """The ``extra`` of a log line about a container that ``operation`` changed; without one, about a container that
    ended.
    """
    extra = of_sandbox(container.sandbox, operation or Operation(""))
    extra["fields"] |= {"container_name": container.config.metadata.name, "container": container.id}
    if operation is None:
        record = container.record
        extra["fields"]["seconds"] = (record.finished_at - record.started_at) / 1e9
        extra["fields"]["exit_code"] = record.exit_code
    return extra


def _since(moment_ns: int) -> float:
    return round((time.time_ns() - moment_ns) / 1e9, 6)
