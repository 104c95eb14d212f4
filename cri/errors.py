"""Which gRPC code each kind of error has."""

from __future__ import annotations

import errno
import os

import grpc

from host import errors
from host.errors import printable

MESSAGE_LIMIT = 4096

_CODES: tuple[tuple[type[errors.PodkeelError], grpc.StatusCode], ...] = (
    (errors.KubeletReasonError, grpc.StatusCode.UNKNOWN),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.WrongStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
    (errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The code and message a client gets for ``error``; never a traceback."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, (
            "no file descriptor is left: end streams and commands, or raise LimitNOFILE= of the systemd unit"
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        message = f"{where}{error.strerror}: free some space, or inodes, of that file system"
        return grpc.StatusCode.RESOURCE_EXHAUSTED, printable(message)
    if not isinstance(error, errors.PodkeelError):
        return grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}): the agent's log has the details"
    code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    message = printable(error.message)
    return code, message if len(message) <= MESSAGE_LIMIT else message[: MESSAGE_LIMIT - 1] + "…"
