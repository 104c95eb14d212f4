"""The request to conmon for a container."""

from __future__ import annotations

import posixpath

from runtime.oci.conmon import MonitorRequest
from runtime.oci.oci_runtime import OciRuntime
from runtime.state.container import Container


def monitor_request(container: Container, runtime: OciRuntime) -> MonitorRequest:
    """The request for ``Monitors.prepare``."""
    config = container.config
    return MonitorRequest(
        container_id=container.id,
        name=f"{container.sandbox.config.metadata.name}/{config.metadata.name}",
        runtime=runtime.executable,
        runtime_arguments=[*runtime.arguments, "--log", str(container.folder.runtime_log)],
        log=container.log,
        terminal=config.tty,
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        node_devices=any(posixpath.normpath("/" + m.container_path.lstrip("/")) == "/dev" for m in config.mounts),
    )
