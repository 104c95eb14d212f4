"""Compiles system call filters to the kernel's form (BPF) with libseccomp. host/libc.py installs them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from host.errors import PodkeelError, UnavailableError

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
NOT_EQUAL, LESS, LESS_OR_EQUAL, EQUAL, GREATER_OR_EQUAL, GREATER, MASKED_EQUAL = range(1, 8)

_UNKNOWN_SYSCALL = -1
_OPTIMIZE = 8
_BINARY_TREE = 2


class Comparison(ctypes.Structure):
    """A condition on one argument of a call: its index, an operator, the value, and the value after a mask."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """The calls ``names`` get ``action`` if all ``comparisons`` hold."""

    names: Sequence[str]
    action: int
    comparisons: Sequence[Comparison] = ()


def compile_filter(default: int, rules: Iterable[Rule], architectures: Iterable[str] = ()) -> bytes:
    """The filter for seccomp(2). The kernel finds a call's rule by binary search, if libseccomp supports that.

    ``architectures`` (such as ``x32``) are accepted in addition to the machine's own; a call of another one kills the
    process. Names that libseccomp does not know get the default action. Raises UnavailableError if libseccomp is
    missing, PodkeelError if it refuses a rule.
    """
    library = _library()
    context = library.seccomp_init(default)
    if not context:
        raise PodkeelError("libseccomp made no filter")
    try:
        library.seccomp_attr_set(context, _OPTIMIZE, _BINARY_TREE)  # fails in older versions, which is no error
        for name in architectures:
            token = library.seccomp_arch_resolve_name(name.encode())
            if not token:
                raise PodkeelError(f"libseccomp does not know the architecture {name}")
            _check(library.seccomp_arch_add(context, token), name, allowed=(errno.EEXIST,))
        for rule in rules:
            if rule.action != default:
                _add(library, context, rule)
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise UnavailableError("libseccomp.so.2 is not installed (Debian package libseccomp2)") from error
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
        ctypes.POINTER(Comparison),
    )
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return library


def _add(library: ctypes.CDLL, context: int, rule: Rule) -> None:
    array = (Comparison * len(rule.comparisons))(*rule.comparisons)
    for name in rule.names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN_SYSCALL:  # newer than the library: it gets the default action, as in the OCI runtimes
            continue
        _check(library.seccomp_rule_add_array(context, rule.action, number, len(rule.comparisons), array), name)


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
