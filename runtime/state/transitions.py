"""What the line of a state change carries beside its text: ids, names and duration, for collectors to search by."""

from __future__ import annotations

import time
from typing import Any

from host.stages import Operation
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox


def of_sandbox(sandbox: Sandbox, operation: Operation) -> dict[str, Any]:
    """The ``extra`` of a line about a sandbox that ``operation`` changed."""
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
    """The ``extra`` of a line about a container that ``operation`` changed; without one: that ended by itself."""
    extra = of_sandbox(container.sandbox, operation or Operation(""))
    extra["fields"] |= {"container_name": container.config.metadata.name, "container": container.id}
    if operation is None:
        record = container.record
        extra["fields"]["seconds"] = (record.finished_at - record.started_at) / 1e9
        extra["fields"]["exit_code"] = record.exit_code
    return extra


def _since(moment_ns: int) -> float:
    return round((time.time_ns() - moment_ns) / 1e9, 6)
