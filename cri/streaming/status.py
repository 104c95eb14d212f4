"""The status of a remote command in the forms that clients parse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class CommandStatus:
    """The content of a Kubernetes ``Status`` object; without a message it is a success."""

    message: str = ""
    exit_code: int | None = None

    @classmethod
    def of_exit(cls, command: Sequence[str], exit_code: int) -> CommandStatus:
        """The status of a command that ran and ended."""
        if exit_code == 0:
            return cls()
        return cls(
            "command terminated with non-zero exit code: "
            f"error executing command [{' '.join(command)}], exit code {exit_code}",
            exit_code,
        )

    @classmethod
    def of_error(cls, what_failed: str, message: str) -> CommandStatus:
        """The status of a command that could not be run, or whose streams were ended early."""
        return cls(f"Internal error occurred: {what_failed}: {message}")

    def as_json(self) -> bytes:
        """The status's text for protocol versions from 4."""
        if not self.message:
            return msgspec.json.encode({"status": "Success"})
        status: dict[str, Any] = {"status": "Failure", "message": self.message}
        if self.exit_code is None:
            status |= {"reason": "InternalError", "code": 500}
        else:
            cause = {"reason": "ExitCode", "message": str(self.exit_code)}
            status |= {"reason": "NonZeroExitCode", "details": {"causes": [cause]}}
        return msgspec.json.encode(status)

    def as_text(self) -> bytes:
        """The status's text for protocol versions before 4: an empty one means success."""
        return self.message.encode()
