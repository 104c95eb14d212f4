"""The form of a seccomp profile that container engines share: OCI's ``linux.seccomp`` with conditions."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Action = Literal[
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
]
Operator = Literal[
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
]

ErrorNumber = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class _Struct(msgspec.Struct, omit_defaults=True, rename="camel"):
    """The base of all structs here: names are camelCase, and default values are not written."""


class Argument(_Struct):
    """A condition on one argument of a system call."""

    index: Annotated[int, msgspec.Meta(ge=0, le=5)]
    value: Annotated[int, msgspec.Meta(ge=0)]
    op: Operator
    value_two: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if max(self.value, self.value_two) >= 1 << 64:
            raise ValueError("an argument's value has at most 64 bits")


class Condition(_Struct):
    """When a rule applies (``includes``) or does not apply (``excludes``)."""

    caps: list[str] = []
    arches: list[str] = []
    min_kernel: str = ""


ALWAYS = Condition()


class Rule(_Struct):
    """The action for some system calls. ``comment`` has the reason."""

    names: list[str]
    action: Action
    errno_ret: ErrorNumber | None = None
    args: list[Argument] | None = None
    comment: str = ""
    includes: Condition | None = None
    excludes: Condition | None = None


class Architecture(_Struct):
    """An architecture, and those whose system calls its kernel also accepts."""

    architecture: str
    sub_architectures: list[str] | None = None


class Profile(_Struct):
    """A complete profile in its stored form."""

    default_action: Action
    default_errno_ret: ErrorNumber | None = None
    architectures: list[str] | None = None
    arch_map: list[Architecture] | None = None
    flags: list[str] | None = None
    listener_path: str = ""
    listener_metadata: str = ""
    syscalls: list[Rule] | None = None
