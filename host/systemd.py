"""Reads what systemd passes to a service in its environment, and sends notifications to systemd (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import MutableMapping

# Only for the agent. With NOTIFY_SOCKET, crun and runc pass a socket to the container: then they fail, or wait for a
# message that the container never sends.
_FOR_THIS_PROCESS = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_MAX_DESCRIPTORS = 64


class ServiceManager:
    """systemd, if it started this process. Otherwise notifications are dropped.

    ``watchdog_seconds``: systemd restarts the service if ``alive`` is not called for so long; 0 if it does not watch.
    ``sockets`` are the sockets that systemd listens on for the service, by their paths.
    """

    def __init__(
        self, address: str, watchdog_seconds: float = 0.0, sockets: dict[str, socket.socket] | None = None
    ) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""
        self.watchdog_seconds = watchdog_seconds
        self.sockets = sockets or {}

    @classmethod
    def of_environment(cls, environment: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """Read ``environment``. Its variables for systemd are removed, because child processes must not get them."""
        taken = {name: environment.pop(name, "") for name in _FOR_THIS_PROCESS}
        own = str(os.getpid())
        watchdog = _number(taken["WATCHDOG_USEC"]) / 1e6 if taken["WATCHDOG_PID"] in ("", own) else 0.0
        count = _number(taken["LISTEN_FDS"]) if taken["LISTEN_PID"] == own else 0
        return cls(taken["NOTIFY_SOCKET"], watchdog, _listening(min(count, _MAX_DESCRIPTORS)))

    def ready(self, status: str) -> None:
        """Report that this service is ready, after a start or a reload."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Report that the configuration is being read again. ``ready`` reports the end."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reading the configuration")

    def stopping(self) -> None:
        """Report that this service is stopping."""
        self._send("STOPPING=1", "STATUS=stopping: pods keep running")

    def status(self, status: str) -> None:
        """Report in one line what the service does, unless it is the same line as before."""
        if status != self._status:
            self._send(f"STATUS={status}")

    def alive(self) -> None:
        """Report that the service works, for WatchdogSec=."""
        self._send("WATCHDOG=1")

    def starting(self, seconds: float) -> None:
        """Report that the start continues and may take ``seconds`` more, even if TimeoutStartSec= is shorter."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, *assignments: str) -> None:
        """Send a message, or drop it if systemd does not accept it at once: nothing may wait for systemd."""
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            if name == "STATUS":
                self._status = value
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
                notify.sendto("\n".join(assignments).encode(), self._address)
        except OSError:
            self._status = ""  # so that it is sent again


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _listening(count: int) -> dict[str, socket.socket]:
    """The unix stream sockets among the first ``count`` passed descriptors, by path. Children do not inherit them."""
    found = {}
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + count):
        os.set_inheritable(descriptor, False)
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            continue
        passed = socket.socket(fileno=descriptor)
        name = passed.getsockname() if passed.family == socket.AF_UNIX else ""
        if passed.type == socket.SOCK_STREAM and isinstance(name, str) and name.startswith("/"):
            passed.setblocking(False)
            found[name] = passed
        else:
            passed.detach()
    return found
