"""Compiles a seccomp profile to the kernel's own form (BPF), once for many containers.

An OCI runtime that gets a profile compiles it for every container, which takes longer than everything else it does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from host.errors import PodkeelError
from host.seccomp import (
    ALLOW,
    EQUAL,
    ERRNO,
    GREATER,
    GREATER_OR_EQUAL,
    LESS,
    LESS_OR_EQUAL,
    MASKED_EQUAL,
    NOT_EQUAL,
    Comparison,
    compile_filter,
)
from host.seccomp import Rule as FilterRule
from runtime.specgen.security.seccomp_profile import Argument, Profile

_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": ERRNO,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": ALLOW,
}
_OPERATORS = {
    "SCMP_CMP_NE": NOT_EQUAL,
    "SCMP_CMP_LT": LESS,
    "SCMP_CMP_LE": LESS_OR_EQUAL,
    "SCMP_CMP_EQ": EQUAL,
    "SCMP_CMP_GE": GREATER_OR_EQUAL,
    "SCMP_CMP_GT": GREATER,
    "SCMP_CMP_MASKED_EQ": MASKED_EQUAL,
}


def compile_bpf(profile: Profile) -> bytes | None:
    """The filter for seccomp(2) for a ``profile`` whose conditions are evaluated.

    None if the OCI runtime must compile it: the profile uses flags or a listener, or libseccomp is missing or does not
    support it.
    """
    actions = {rule.action for rule in profile.syscalls or ()} | {profile.default_action}
    if profile.flags or profile.listener_path or not actions <= _ACTIONS.keys():
        return None
    default = _action(profile.default_action, profile.default_errno_ret)
    architectures = [name.removeprefix("SCMP_ARCH_").lower() for name in profile.architectures or ()]
    try:
        return compile_filter(default, _rules(profile), architectures)
    except PodkeelError:
        return None


def _rules(profile: Profile) -> Iterator[FilterRule]:
    for rule in profile.syscalls or ():
        action = _action(rule.action, rule.errno_ret)
        for arguments in _alternatives(rule.args or ()):
            yield FilterRule(rule.names, action, [_comparison(argument) for argument in arguments])


def _alternatives(arguments: Sequence[Argument]) -> list[Sequence[Argument]]:
    """Conditions that must hold together. Several on one argument are alternatives, as the OCI runtimes read them."""
    if len({argument.index for argument in arguments}) == len(arguments):
        return [arguments]
    return [[argument] for argument in arguments]


def _comparison(argument: Argument) -> Comparison:
    return Comparison(argument.index, _OPERATORS[argument.op], argument.value, argument.value_two)


def _action(action: str, number: int | None) -> int:
    value = _ACTIONS[action]
    if action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        value |= (errno.EPERM if number is None else number) & 0xFFFF
    return value
