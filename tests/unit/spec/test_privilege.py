"""Capabilities, masked paths, AppArmor and seccomp."""

from __future__ import annotations

import json
import platform
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.capabilities import DEFAULT, NAMES, capability_sets
from runtime.specgen.security.masked_paths import (
    MASKED_PATHS,
    READONLY_PATHS,
    apparmor_profile,
    masked_and_readonly_paths,
)
from runtime.specgen.security.seccomp import DEFAULT_PROFILE, compile_profile, seccomp
from runtime.specgen.security.seccomp_bpf import compile_bpf
from runtime.specgen.security.seccomp_profile import Profile, Rule
from tests.unit.spec.requests import NODE, container, secured

Context = cri_pb2.LinuxContainerSecurityContext


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, DEFAULT),
        ({"add_capabilities": ["NET_ADMIN", "cap_sys_time"]}, DEFAULT | {"CAP_NET_ADMIN", "CAP_SYS_TIME"}),
        ({"drop_capabilities": ["CHOWN", "CAP_KILL"]}, DEFAULT - {"CAP_CHOWN", "CAP_KILL"}),
        ({"drop_capabilities": ["ALL"]}, frozenset()),
        ({"drop_capabilities": ["all"], "add_capabilities": ["CHOWN"]}, {"CAP_CHOWN"}),
        ({"add_capabilities": ["ALL"]}, NODE.capabilities),
        ({"add_capabilities": ["ALL"], "drop_capabilities": ["MKNOD"]}, NODE.capabilities - {"CAP_MKNOD"}),
        ({"drop_capabilities": ["ALL"], "add_ambient_capabilities": ["NET_RAW"]}, {"CAP_NET_RAW"}),
    ],
)
def test_capabilities(fields: dict[str, Any], expected: set[str]) -> None:
    sets, permitted = capability_sets(Context(capabilities=cri_pb2.Capability(**fields)), NODE.capabilities)
    assert permitted == expected
    assert set(sets.bounding) == set(sets.permitted) == set(sets.effective) == expected
    assert sets.bounding == sorted(sets.bounding, key=NAMES.index)
    ambient = {"CAP_NET_RAW"} if "add_ambient_capabilities" in fields else set()
    assert set(sets.ambient) == set(sets.inheritable) == ambient


@pytest.mark.parametrize("field", ["add_capabilities", "drop_capabilities", "add_ambient_capabilities"])
def test_unknown_capability(field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{field}: CAP_FLY is not a capability"):
        capability_sets(Context(capabilities=cri_pb2.Capability(**{field: ["fly"]})), NODE.capabilities)


def test_a_capability_the_node_lacks() -> None:
    wanted = Context(capabilities=cri_pb2.Capability(add_capabilities=["SYS_RESOURCE"]))
    with pytest.raises(InvalidArgumentError, match="CAP_SYS_RESOURCE cannot be given"):
        capability_sets(wanted, NODE.capabilities)
    assert "CAP_SYS_RESOURCE" in capability_sets(wanted, frozenset(NAMES))[1]


def test_privileged_has_everything_the_node_has() -> None:
    assert capability_sets(Context(privileged=True), NODE.capabilities)[1] == NODE.capabilities


def test_masked_and_readonly_paths() -> None:
    assert masked_and_readonly_paths(container()) == (list(MASKED_PATHS), list(READONLY_PATHS))
    assert masked_and_readonly_paths(secured()) == ([], [])
    given = secured(masked_paths=["/proc/keys"], readonly_paths=["/proc/sys"])
    assert masked_and_readonly_paths(given) == (["/proc/keys"], ["/proc/sys"])
    assert masked_and_readonly_paths(secured(privileged=True, masked_paths=["/proc/keys"])) == ([], [])
    with pytest.raises(InvalidArgumentError, match="'proc/keys' is not absolute"):
        masked_and_readonly_paths(secured(masked_paths=["proc/keys"]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "own"),
        ({"apparmor": {"profile_type": "RuntimeDefault"}}, "own"),
        ({"apparmor": {"profile_type": "Unconfined"}, "apparmor_profile": "runtime/default"}, ""),
        ({"apparmor_profile": "unconfined"}, ""),
        ({"apparmor_profile": "runtime/default"}, "own"),
        ({"apparmor": {"profile_type": "Unconfined"}, "privileged": True}, ""),
        ({"privileged": True}, ""),
    ],
)
def test_apparmor(fields: dict[str, Any], expected: str) -> None:
    with_apparmor = replace(NODE, apparmor_enabled=True)
    assert apparmor_profile(Context(**fields), with_apparmor, default="own") == expected
    assert apparmor_profile(Context(**fields), NODE, default="own") == ""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"apparmor": {"profile_type": "Localhost", "localhost_ref": "mine"}}, "has no AppArmor"),
        ({"apparmor": {"profile_type": "Localhost"}}, "needs localhost_ref"),
        ({"apparmor_profile": "localhost/mine"}, "'mine' cannot be used"),
        ({"apparmor_profile": "something"}, "'something' is unknown"),
    ],
)
def test_apparmor_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        apparmor_profile(Context(**fields), NODE, default="own")


def test_apparmor_profile_that_is_not_loaded() -> None:
    wanted = Context(apparmor={"profile_type": "Localhost", "localhost_ref": "no-such-profile"})
    with pytest.raises(InvalidArgumentError, match="'no-such-profile' is not loaded"):
        apparmor_profile(wanted, replace(NODE, apparmor_enabled=True), default="own")


def _filter(caps: frozenset[str], machine: str = "x86_64", kernel: tuple[int, int] = (6, 1)) -> Profile:
    profile = msgspec.json.decode(DEFAULT_PROFILE.read_bytes(), type=Profile)
    return compile_profile(profile, caps, machine, kernel)


def _allowed(compiled: Profile) -> set[str]:
    return {
        name
        for rule in compiled.syscalls or ()
        if rule.action == "SCMP_ACT_ALLOW" and not rule.args
        for name in rule.names
    }


def test_default_profile_denies_by_default_and_says_why() -> None:
    profile = msgspec.json.decode(DEFAULT_PROFILE.read_bytes(), type=Profile)
    assert (profile.default_action, profile.default_errno_ret) == ("SCMP_ACT_ERRNO", 1)
    for rule in profile.syscalls or ():
        assert len(rule.comment) > 10, rule.names
        assert len(rule.names) == len(set(rule.names)), rule.names


@pytest.mark.parametrize(
    ("syscall", "capability"),
    [
        ("mount", "SYS_ADMIN"),
        ("setns", "SYS_ADMIN"),
        ("unshare", "SYS_ADMIN"),
        ("clone3", "SYS_ADMIN"),
        ("bpf", "BPF"),
        ("bpf", "SYS_ADMIN"),
        ("perf_event_open", "PERFMON"),
        ("init_module", "SYS_MODULE"),
        ("open_by_handle_at", "DAC_READ_SEARCH"),
        ("reboot", "SYS_BOOT"),
        ("clock_settime", "SYS_TIME"),
        ("syslog", "SYSLOG"),
        ("iopl", "SYS_RAWIO"),
        ("pidfd_getfd", "SYS_PTRACE"),
        ("chroot", "SYS_CHROOT"),
    ],
)
def test_what_a_capability_opens(syscall: str, capability: str) -> None:
    assert syscall not in _allowed(_filter(frozenset()))
    assert syscall in _allowed(_filter(frozenset({"CAP_" + capability})))


@pytest.mark.parametrize(
    "syscall", ["io_uring_setup", "keyctl", "add_key", "request_key", "userfaultfd", "kexec_load", "swapon", "uselib"]
)
def test_what_nothing_opens(syscall: str) -> None:
    assert syscall not in _allowed(_filter(frozenset(NAMES)))


def test_ptrace_depends_on_the_kernel() -> None:
    assert "ptrace" in _allowed(_filter(DEFAULT, kernel=(4, 8)))
    assert "ptrace" not in _allowed(_filter(DEFAULT, kernel=(4, 7)))
    assert "ptrace" in _allowed(_filter(DEFAULT | {"CAP_SYS_PTRACE"}, kernel=(4, 7)))


def test_clone_may_not_make_namespaces() -> None:
    rules = [rule for rule in _filter(DEFAULT).syscalls or () if "clone" in rule.names]
    assert [[(a.index, a.value, a.value_two, a.op) for a in rule.args or ()] for rule in rules] == [
        [(0, 0x7E020000, 0, "SCMP_CMP_MASKED_EQ")]
    ]
    clone3 = [rule for rule in _filter(DEFAULT).syscalls or () if "clone3" in rule.names]
    assert [(rule.action, rule.errno_ret) for rule in clone3] == [("SCMP_ACT_ERRNO", 38)]
    on_s390 = [rule for rule in _filter(DEFAULT, "s390x").syscalls or () if "clone" in rule.names]
    assert [rule.args[0].index for rule in on_s390 if rule.args] == [1]


def test_architectures() -> None:
    assert _filter(DEFAULT).architectures == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert _filter(DEFAULT, "aarch64").architectures == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    assert "modify_ldt" in _allowed(_filter(DEFAULT))
    assert "modify_ldt" not in _allowed(_filter(DEFAULT, "aarch64"))


def test_compiled_filter_is_plain_and_made_once() -> None:
    wanted = Context(seccomp={"profile_type": "RuntimeDefault"})
    first = seccomp(wanted, DEFAULT, NODE)
    assert first is not None
    assert seccomp(wanted, DEFAULT, NODE) is first
    assert seccomp(wanted, DEFAULT | {"CAP_SYS_ADMIN"}, NODE) != first
    decoded = json.loads(bytes(first.encoded))
    assert set(decoded) == {"defaultAction", "defaultErrnoRet", "architectures", "syscalls"}
    assert all(set(rule) <= {"names", "action", "errnoRet", "args"} for rule in decoded["syscalls"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"seccomp": {"profile_type": "Unconfined"}},
        {"seccomp_profile_path": "unconfined"},
        {"seccomp": {"profile_type": "RuntimeDefault"}, "privileged": True},
        {"seccomp": {"profile_type": "Unconfined"}, "seccomp_profile_path": "runtime/default"},
    ],
)
def test_unconfined(fields: dict[str, Any]) -> None:
    assert seccomp(Context(**fields), DEFAULT, NODE) is None


def test_deprecated_path_means_the_same() -> None:
    new = seccomp(Context(seccomp={"profile_type": "RuntimeDefault"}), DEFAULT, NODE)
    assert seccomp(Context(seccomp_profile_path="runtime/default"), DEFAULT, NODE) is new


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("not json", "is not a seccomp profile"),
        ('{"defaultAction": "SCMP_ACT_DANCE"}', "is not a seccomp profile"),
        ("{}", "is not a seccomp profile"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": "x"}]}', "is not a seccomp profile"),
    ],
)
def test_localhost_profile_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "profile.json").write_text(content)
    for fields in (
        {"seccomp": {"profile_type": "Localhost", "localhost_ref": str(tmp_path / "profile.json")}},
        {"seccomp_profile_path": f"localhost/{tmp_path}/profile.json"},
    ):
        with pytest.raises(InvalidArgumentError, match=reason):
            seccomp(Context(**fields), DEFAULT, NODE)


def test_localhost_profile_is_read_again_when_it_changes(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    wanted = Context(seccomp={"profile_type": "Localhost", "localhost_ref": str(profile)})
    for action in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG"):
        profile.write_text(json.dumps({"defaultAction": action, "architectures": ["SCMP_ARCH_X86_64"]}))
        compiled = seccomp(wanted, DEFAULT, NODE)
        assert compiled is not None
        assert json.loads(bytes(compiled.encoded))["defaultAction"] == action


def test_relative_localhost_profile() -> None:
    with pytest.raises(InvalidArgumentError, match="not absolute"):
        seccomp(Context(seccomp={"profile_type": "Localhost", "localhost_ref": "x.json"}), DEFAULT, NODE)


# Applies the filter it is given on its standard input to itself; prints the errors of socket(2) by family.
_SOCKETS = """
import ctypes, json, sys
libc = ctypes.CDLL(None, use_errno=True)
program = ctypes.create_string_buffer(sys.stdin.buffer.read())
class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))
held = Filter((len(program) - 1) // 8, ctypes.addressof(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(held), 0, 0) == 0, ctypes.get_errno()
def error(family):
    ctypes.set_errno(0)
    return 0 if libc.syscall(SOCKET, ctypes.c_ulong(family), 99, 0) >= 0 else ctypes.get_errno()
print(json.dumps([family for family in range(64) if error(family) == 1]))
print(json.dumps([family for family in range(64) if error(family | 1 << 32) == 1]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of socket(2) is that of x86-64")
def test_no_spelling_of_a_socket_s_family_gets_past_the_filter() -> None:
    """A type of socket that no family has: what gets to the kernel fails there, but not with EPERM."""
    compiled = compile_bpf(_filter(DEFAULT))
    assert compiled is not None
    command = [sys.executable, "-I", "-c", _SOCKETS.replace("SOCKET", "41")]
    result = subprocess.run(command, input=compiled, check=True, capture_output=True)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [[socket.AF_VSOCK]] * 2


def _instructions(compiled: bytes | None) -> list[tuple[int, int, int, int]]:
    assert compiled is not None
    assert len(compiled) % 8 == 0
    return list(struct.iter_unpack("HBBI", compiled))


def test_compiled_to_bpf() -> None:
    rules = [
        Rule(names=["mkdir", "no_such_call"], action="SCMP_ACT_ERRNO", errno_ret=38),
        Rule(names=["chmod"], action="SCMP_ACT_ERRNO"),
        Rule(names=["chown"], action="SCMP_ACT_ALLOW"),
    ]
    profile = Profile(default_action="SCMP_ACT_ALLOW", architectures=["SCMP_ARCH_X86_64"], syscalls=rules)
    returned = {value for code, _, _, value in _instructions(compile_bpf(profile)) if code == 6}
    assert {0x7FFF0000, 0x50000 | 38, 0x50000 | 1} <= returned
    assert len(_instructions(compile_bpf(_filter(DEFAULT)))) < 4096  # the kernel's limit


@pytest.mark.parametrize(
    "profile",
    [
        Profile(default_action="SCMP_ACT_ALLOW", flags=["SECCOMP_FILTER_FLAG_LOG"]),
        Profile(default_action="SCMP_ACT_ALLOW", listener_path="/x"),
        Profile(default_action="SCMP_ACT_ALLOW", syscalls=[Rule(names=["mkdir"], action="SCMP_ACT_NOTIFY")]),
        Profile(default_action="SCMP_ACT_ALLOW", architectures=["SCMP_ARCH_ABACUS"]),
    ],
)
def test_what_is_left_to_the_runtime(profile: Profile) -> None:
    assert compile_bpf(profile) is None
