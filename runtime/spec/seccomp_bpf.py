"""Compiling a seccomp filter to the kernel's own form (BPF) with libseccomp, once for many containers.

An OCI runtime that is given a profile compiles it for every container, which costs it more than all else it does.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from host.errors import PodkeelError

if TYPE_CHECKING:
    from runtime.spec.seccomp import Argument, Profile, Rule

_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_UNKNOWN_SYSCALL = -1
_OPTIMIZE = 8
_BINARY_TREE = 2


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def compile_bpf(profile: Profile) -> bytes | None:
    """The filter for seccomp(2) that a decided ``profile`` means; the kernel finds a call's rule by binary search.

    None where that is left to the OCI runtime: the profile uses flags or a listener, or libseccomp is not there or
    cannot do what it says.
    """
    actions = {rule.action for rule in profile.syscalls or ()} | {profile.default_action}
    if profile.flags or profile.listener_path or not actions <= _ACTIONS.keys():
        return None
    library = _library()
    if library is None:
        return None
    try:
        with _filter(library, profile) as context:
            for rule in profile.syscalls or ():
                _add_rule(library, context, profile, rule)
            return _export(library, context)
    except PodkeelError:
        return None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_release.restype = None
    library.seccomp_arch_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    library.seccomp_arch_add.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    )
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return library


@contextmanager
def _filter(library: ctypes.CDLL, profile: Profile) -> Iterator[int]:
    context = library.seccomp_init(_action(profile.default_action, profile.default_errno_ret))
    if not context:
        raise PodkeelError("libseccomp made no filter")
    try:
        # Older versions know no binary search; then it is a list.
        library.seccomp_attr_set(context, _OPTIMIZE, _BINARY_TREE)
        for name in profile.architectures or ():
            token = library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
            if not token:
                raise PodkeelError(f"libseccomp does not know {name}")
            _check(library.seccomp_arch_add(context, token), name, allowed=(errno.EEXIST,))
        yield context
    finally:
        library.seccomp_release(context)


def _add_rule(library: ctypes.CDLL, context: int, profile: Profile, rule: Rule) -> None:
    action = _action(rule.action, rule.errno_ret)
    if action == _action(profile.default_action, profile.default_errno_ret):
        return
    for name in rule.names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN_SYSCALL:  # newer than the library: the default action, as in the OCI runtimes
            continue
        for arguments in _alternatives(rule.args or ()):
            array = (_Comparison * len(arguments))(*map(_comparison, arguments))
            _check(library.seccomp_rule_add_array(context, action, number, len(arguments), array), name)


def _alternatives(arguments: Sequence[Argument]) -> list[Sequence[Argument]]:
    """Conditions that hold together; several on one argument are alternatives, as the OCI runtimes read them."""
    if len({argument.index for argument in arguments}) == len(arguments):
        return [arguments]
    return [[argument] for argument in arguments]


def _comparison(argument: Argument) -> _Comparison:
    return _Comparison(argument.index, _OPERATORS[argument.op], argument.value, argument.value_two)


def _action(action: str, number: int | None) -> int:
    value = _ACTIONS[action]
    if action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        value |= (errno.EPERM if number is None else number) & 0xFFFF
    return value


def _export(library: ctypes.CDLL, context: int) -> bytes:
    descriptor = os.memfd_create("seccomp")
    try:
        _check(library.seccomp_export_bpf(context, descriptor), "the filter")
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def _check(result: int, what: str, allowed: Sequence[int] = ()) -> None:
    if result < 0 and -result not in allowed:
        raise PodkeelError(f"libseccomp refused {what}: {os.strerror(-result)}")
