"""Calls posix_spawn(3) without the GIL, so that other threads keep running. Python's own function holds the GIL.

The calling thread waits until the child executes its program. On a busy node that takes many milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping, Sequence

_SETSIGDEF = 0x04
_SETSIGMASK = 0x08
_SETSID = 0x80
# Signals that Python ignores. The child must not inherit that.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OPAQUE_BYTES = 1024  # larger than these structures are in any C library

_libc = ctypes.CDLL(None)


def _opaque() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(_OPAQUE_BYTES)


def posix_spawn(
    command: Sequence[str], title: str, environment: Mapping[str, str], descriptors: Mapping[int, int]
) -> int:
    """Start ``command``, found on the PATH, in a new session with ``title`` as its name. Returns its pid.

    ``descriptors`` maps descriptor numbers of the child to numbers of this process. No number of this process may also
    be a number of the child. Of 0, 1 and 2, those without an entry are /dev/null. Raises OSError.
    """
    actions, attributes = _opaque(), _opaque()
    _check(_libc.posix_spawn_file_actions_init(actions), command[0])
    _check(_libc.posix_spawnattr_init(attributes), command[0])
    try:
        for child in (0, 1, 2):
            if child not in descriptors:
                add_open = _libc.posix_spawn_file_actions_addopen
                _check(add_open(actions, child, b"/dev/null", os.O_RDWR, 0), command[0])
        for child, ours in descriptors.items():
            _check(_libc.posix_spawn_file_actions_adddup2(actions, ours, child), command[0])
        _set_attributes(attributes)
        pid = ctypes.c_int()
        arguments = _strings([title, *command[1:]])
        variables = _strings([f"{name}={value}" for name, value in environment.items()])
        program = os.fsencode(command[0])
        _check(_libc.posix_spawnp(ctypes.byref(pid), program, actions, attributes, arguments, variables), command[0])
        return pid.value
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)
        _libc.posix_spawnattr_destroy(attributes)


def _set_attributes(attributes: ctypes.Array[ctypes.c_char]) -> None:
    default, mask = _opaque(), _opaque()
    _libc.sigemptyset(default)
    _libc.sigemptyset(mask)
    for number in _DEFAULT_SIGNALS:
        _libc.sigaddset(default, int(number))
    _libc.posix_spawnattr_setsigdefault(attributes, default)
    _libc.posix_spawnattr_setsigmask(attributes, mask)
    _libc.posix_spawnattr_setflags(attributes, ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID))


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [os.fsencode(text) for text in texts]
    if any(b"\0" in text for text in encoded):
        raise ValueError("an argument or environment variable has a NUL byte")
    return (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)


def _check(number: int, program: str) -> None:
    if number:
        raise OSError(number, os.strerror(number), program)
