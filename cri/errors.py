"""Which gRPC code each kind of error has."""

from __future__ import annotations

import errno
import os

import grpc

from host import errors
from host.errors import printable

MESSAGE_LIMIT = 4096  # bytes
_ELLIPSIS = "…"

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
_NO_THREAD = "can't start new thread"  # of Python's threading
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The code and message a client gets for ``error``; never a traceback."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, (
            "no file descriptor is left: end streams and commands, or raise LimitNOFILE= of the systemd unit"
        )
    if isinstance(error, OSError) and error.errno == errno.EUSERS:
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error.strerror)
    if isinstance(error, BlockingIOError) or (isinstance(error, RuntimeError) and _NO_THREAD in str(error)):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, (
            "no process or thread can be started: end processes, or raise kernel.pid_max, kernel.threads-max or "
            "TasksMax= of the systemd unit"
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        message = f"{where}{error.strerror}: free some space, or inodes, of that file system"
        return grpc.StatusCode.RESOURCE_EXHAUSTED, printable(message)
    if not isinstance(error, errors.PodkeelError):
        return grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}): the agent's log has the details"
    code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    return code, _shortened(printable(error.message))


def _shortened(message: str) -> str:
    """``message`` within MESSAGE_LIMIT as it is sent: clients answer RESOURCE_EXHAUSTED to more than 8 KiB of headers.

    gRPC percent-encodes each byte that is not printable ASCII (gRPC over HTTP2, "Responses").
    """
    sent = len(_ELLIPSIS.encode()) * 3
    for index, character in enumerate(message[: MESSAGE_LIMIT + 1]):
        sent += 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode("utf-8", "replace"))
        if sent > MESSAGE_LIMIT:
            return message[:index] + _ELLIPSIS
    return message
