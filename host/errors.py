"""The hierarchy of errors. ``cri/errors.py`` maps each kind to a gRPC code.

A message says what was tried on which object, and what a person can do about the error.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class PodkeelError(Exception):
    """Any error that Podkeel raises on purpose. This class itself is an internal error."""

    @property
    def message(self) -> str:
        """The text for the client."""
        return str(self.args[0]) if self.args else type(self).__name__

    def add_context(self, context: str) -> None:
        """Put ``context`` before the message. The kind of the error, and the reason that kubelet matches, stay."""
        self.args = (f"{context}: {self.args[0]}" if self.args else context,)


def printable(text: str) -> str:
    """The text with escapes for bytes of file names that are not UTF-8 (os.fsdecode)."""
    return text.encode(errors="backslashreplace").decode()


class NotFoundError(PodkeelError):
    """The object that the request names does not exist."""


class InvalidArgumentError(PodkeelError):
    """The request is wrong in any state of the node."""


class WrongStateError(PodkeelError):
    """The object exists, but its state does not allow the request."""


class AlreadyExistsError(PodkeelError):
    """The object to be created exists with another configuration."""


class LimitError(PodkeelError):
    """A limit of the node or of the configuration is reached."""


class NoSpaceError(LimitError):
    """A disk is full, or its quota is used up."""


class NodeLimitError(LimitError):
    """The node has no more processes or namespaces now. A later try may succeed."""


class DeadlineError(PodkeelError):
    """The work took longer than its time limit."""


class UnsupportedError(PodkeelError):
    """Podkeel, this kernel or this OCI runtime does not support the request."""


class PermissionDeniedError(PodkeelError):
    """Credentials are missing or were refused."""


class UnavailableError(PodkeelError):
    """Something that this request depends on cannot be reached now. A later try may succeed."""


class KubeletReasonError(PodkeelError):
    """An error whose message begins with a reason that kubelet matches, such as ``RegistryUnavailable``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def message(self) -> str:
        """The text for the client. It always begins with the reason, even if context was added in front."""
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
