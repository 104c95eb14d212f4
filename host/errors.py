"""The one hierarchy of errors; ``cri/errors.py`` maps each kind to its gRPC code.

A message says what was tried on which object and, where a person can do something about it, what to do.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class PodkeelError(Exception):
    """Any error that Podkeel raises on purpose. Without a more exact kind it is an internal error."""

    @property
    def message(self) -> str:
        """The sentence for the client."""
        return str(self.args[0]) if self.args else type(self).__name__

    def add_context(self, context: str) -> None:
        """Add ``context`` before the message. The kind of the error, and the reason that kubelet matches, stay."""
        self.args = (f"{context}: {self.args[0]}" if self.args else context,)


def printable(text: str) -> str:
    """The text; bytes of file names that are not UTF-8 (os.fsdecode) are escaped."""
    return text.encode(errors="backslashreplace").decode()


class NotFoundError(PodkeelError):
    """The object named by the request does not exist."""


class InvalidArgumentError(PodkeelError):
    """The request itself is wrong, regardless of the state of the node."""


class WrongStateError(PodkeelError):
    """The object exists but is not in a state that allows the request."""


class AlreadyExistsError(PodkeelError):
    """The object to be made exists with another configuration."""


class LimitError(PodkeelError):
    """A limit of the node or of the configuration is reached."""


class NoSpaceError(LimitError):
    """A disk is full, or a quota of it."""


class NodeLimitError(LimitError):
    """The node has no more processes or namespaces now; trying again later may help."""


class DeadlineError(PodkeelError):
    """The work did not finish in its time."""


class UnsupportedError(PodkeelError):
    """Podkeel, this kernel or this OCI runtime cannot do what was asked."""


class PermissionDeniedError(PodkeelError):
    """Credentials are missing or were refused."""


class UnavailableError(PodkeelError):
    """Something this request depends on cannot be reached now; trying again may help."""


class KubeletReasonError(PodkeelError):
    """An error whose message begins with a reason that kubelet matches, such as ``RegistryUnavailable``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def message(self) -> str:
        """The sentence for the client. It always begins with the reason, even if context was added in front."""
        return f"{self.reason}: {super().message}"


class CommandError(PodkeelError):
    """An external command failed: its command line, exit status and last lines of output."""

    def __init__(self, command: Sequence[str], status: int, output: str) -> None:
        self.command = tuple(command)
        self.status = status
        self.output = output.strip()
        ending = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        last_lines = "\n".join(self.output.splitlines()[-10:])
        super().__init__(f"{shlex.join(command)}: {ending}" + (f": {last_lines}" if last_lines else ""))
