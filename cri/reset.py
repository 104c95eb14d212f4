"""``podkeel reset`` as a process. It loads nothing of gRPC, as it serves no calls."""

from __future__ import annotations

import asyncio

from cri.config.configuration import Configuration
from cri.telemetry.logs import configure_logging
from host.systemd import ServiceManager
from runtime.reset import reset as reset_runtime


def reset(configuration: Configuration, *, force: bool = False) -> list[str]:
    """Remove everything that an agent with this configuration left on the host; it must not be running.

    With ``force``, what CNI plugins do not release is given up, and the returned sentences report it.
    """
    ServiceManager.of_environment()
    configure_logging(configuration.log)
    return asyncio.run(reset_runtime(configuration.runtime, configuration.network, configuration.images, force=force))
