"""The kernel's keyrings (keyrings(7))."""

from __future__ import annotations

import contextlib
import ctypes
import os

from host import libc

_KEYCTL = {"x86_64": 250, "ppc64le": 271, "s390x": 280}.get(os.uname().machine, 219)
_JOIN_SESSION_KEYRING = 1


def leave_session_keyring() -> None:
    """Give the calling thread, and what it starts from now on, an empty session keyring instead of an inherited one.

    crun executes commands in containers with the session keyring it was started with, and in it would be the keys of
    the session that started the agent. A kernel without keyrings is no error.
    """
    with contextlib.suppress(OSError):
        libc.syscall(_KEYCTL, ctypes.c_int(_JOIN_SESSION_KEYRING), None)
