"""Seccomp: makes the filter of one container from a profile with conditions.

A profile is JSON in the form that container engines share: OCI's ``linux.seccomp`` with, optionally, ``archMap`` and
for each rule ``comment``, ``includes`` and ``excludes`` (``caps``, ``arches``, ``minKernel``). Each profile is read and
compiled once per set of capabilities and kept encoded.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError
from host.untrusted_json import JsonError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.node_facts import NodeFacts, kernel_version
from runtime.specgen.security.seccomp_bpf import compile_bpf
from runtime.specgen.security.seccomp_profile import ALWAYS, Profile, Rule

DEFAULT_PROFILE = Path(__file__).with_name("seccomp_default.json")
"""Podkeel's own RuntimeDefault."""

PROFILE_LIMIT = 4 * 1024 * 1024

_MACHINES = {
    "x86_64": ("SCMP_ARCH_X86_64", "amd64"),
    "aarch64": ("SCMP_ARCH_AARCH64", "arm64"),
    "ppc64le": ("SCMP_ARCH_PPC64LE", "ppc64le"),
    "s390x": ("SCMP_ARCH_S390X", "s390x"),
    "riscv64": ("SCMP_ARCH_RISCV64", "riscv64"),
}


@dataclass(frozen=True)
class Filter:
    """A filter, shared by all containers with the same one. It is kept as OCI's JSON and, once requested, as BPF."""

    profile: Profile
    encoded: msgspec.Raw

    @cached_property
    def bpf(self) -> str | None:
        """The compiled filter in base64; None if the OCI runtime compiles it."""
        compiled = compile_bpf(self.profile)
        return None if compiled is None else base64.b64encode(compiled).decode()


def seccomp(
    context: cri_pb2.LinuxContainerSecurityContext,
    permitted: frozenset[str],
    node: NodeFacts,
    *,
    default_profile: Path = DEFAULT_PROFILE,
) -> Filter | None:
    """The filter for a container with the ``permitted`` capabilities; None for unconfined.

    If neither the field nor the deprecated path is set, or the container is privileged, it is unconfined. Raises
    InvalidArgumentError for a profile that is missing or invalid.
    """
    if context.privileged:
        return None
    path = _profile_path(context, default_profile)
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidArgumentError(
            f"seccomp: profile {path} cannot be read: {error.strerror}; put the profile there on this node"
        ) from error
    return _compiled(path, status.st_mtime_ns, status.st_size, permitted, node.machine, node.kernel)


def _profile_path(context: cri_pb2.LinuxContainerSecurityContext, default_profile: Path) -> Path | None:
    if context.HasField("seccomp"):
        kind = context.seccomp.profile_type
        if kind == cri_pb2.SecurityProfile.ProfileType.Unconfined:
            return None
        if kind == cri_pb2.SecurityProfile.ProfileType.RuntimeDefault:
            return default_profile
        reference = context.seccomp.localhost_ref
    else:
        old = context.seccomp_profile_path
        if old in ("", "unconfined"):
            return None
        if old in ("runtime/default", "docker/default"):
            return default_profile
        if not old.startswith("localhost/"):
            raise InvalidArgumentError(
                f"seccomp_profile_path {old!r} is unknown: use runtime/default, unconfined or localhost/<path>"
            )
        reference = old
    reference = reference.removeprefix("localhost/")
    if not reference.startswith("/"):
        raise InvalidArgumentError(
            f"seccomp: localhost_ref {reference!r} is not absolute: use the profile's full path on this node"
        )
    return Path(reference)


@lru_cache(maxsize=128)
def _compiled(
    path: Path, _changed: int, _size: int, permitted: frozenset[str], machine: str, kernel: tuple[int, int]
) -> Filter:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(PROFILE_LIMIT + 1)
        if len(content) > PROFILE_LIMIT:
            raise InvalidArgumentError(f"seccomp: profile {path} is larger than {PROFILE_LIMIT} bytes: shorten it")
        profile = untrusted_json.decode(content, Profile, max_bytes=PROFILE_LIMIT)
    except OSError as error:
        raise InvalidArgumentError(f"seccomp: profile {path} cannot be read: {error.strerror}; repair it") from error
    except JsonError as error:
        raise InvalidArgumentError(f"seccomp: {path} is not a seccomp profile: {error}; correct it") from error
    decided = compile_profile(profile, permitted, machine, kernel)
    return Filter(decided, msgspec.Raw(msgspec.json.encode(decided)))


def compile_profile(profile: Profile, permitted: frozenset[str], machine: str, kernel: tuple[int, int]) -> Profile:
    """The profile with its conditions evaluated and rules of the same action joined, for an OCI runtime."""
    native, short = _MACHINES.get(machine, ("", machine))
    architectures = profile.architectures
    if profile.arch_map is not None:
        known = next((entry for entry in profile.arch_map if entry.architecture == native), None)
        architectures = [known.architecture, *(known.sub_architectures or ())] if known else None
    joined: dict[tuple[str, int | None, bytes], Rule] = {}
    for rule in profile.syscalls or ():
        if not _applies(rule, permitted, short, kernel):
            continue
        effect = (rule.action, rule.errno_ret, msgspec.json.encode(rule.args))
        plain = Rule(names=[], action=rule.action, errno_ret=rule.errno_ret, args=rule.args or None)
        names = joined.setdefault(effect, plain).names
        names += [name for name in rule.names if name not in names]
    return msgspec.structs.replace(profile, architectures=architectures, arch_map=None, syscalls=list(joined.values()))


def _applies(rule: Rule, permitted: frozenset[str], short: str, kernel: tuple[int, int]) -> bool:
    needs, avoids = rule.includes or ALWAYS, rule.excludes or ALWAYS
    if needs.arches and short not in needs.arches:
        return False
    if short in avoids.arches or any(name in permitted for name in avoids.caps):
        return False
    if not all(name in permitted for name in needs.caps):
        return False
    if avoids.min_kernel and kernel >= kernel_version(avoids.min_kernel):
        return False
    return not needs.min_kernel or kernel >= kernel_version(needs.min_kernel)
