"""What systemd passes to a service in its environment, and what the service reports to systemd (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

# For the agent alone. With NOTIFY_SOCKET, crun and runc pass a socket to the container: they fail, or wait for a
# message that the container never sends.
_FOR_THIS_PROCESS = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class ServiceManager:
    """systemd, if it started this process. Otherwise notifications are dropped."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def of_environment(cls, environment: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """The one that ``environment`` names; its variables are taken out, as child processes must not get them."""
        taken = {name: environment.pop(name, "") for name in _FOR_THIS_PROCESS}
        return cls(taken["NOTIFY_SOCKET"])

    def ready(self) -> None:
        """Report that this service is ready. Raises OSError."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", self._address)
