"""The SELinux labels of a container's processes and files, and the files that get them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.node_facts import NodeFacts

CHECK = "/sys/fs/selinux/context"
_WORD = re.compile(r"[A-Za-z0-9_.]+")
_LEVEL = re.compile(r"s\d+(-s\d+)?(:c\d+([.,]c\d+)*)?(-s\d+(:c\d+([.,]c\d+)*)?)?")


@dataclass(frozen=True, slots=True)
class SelinuxLabels:
    """The labels of the process and of its files. Both are empty if SELinux does not apply."""

    process: str = ""
    mount: str = ""


@dataclass(frozen=True, slots=True)
class Relabel:
    """``path`` on the host, with everything in it, gets ``label`` before the container is created."""

    path: str
    label: str


def container_labels(
    config: cri_pb2.ContainerConfig, sandbox: cri_pb2.PodSandboxConfig, node: NodeFacts, *, level: str
) -> SelinuxLabels:
    """The labels of a container: by its own options, else by the pod's. ``level`` is the pod's own level.

    Raises InvalidArgumentError for invalid options, with or without SELinux on the node.
    """
    context = config.linux.security_context
    own = context.HasField("selinux_options") and context.selinux_options != cri_pb2.SELinuxOption()
    options = context.selinux_options if own else sandbox.linux.security_context.selinux_options
    return selinux_labels(options, node, privileged=context.privileged, level=level)


def selinux_labels(
    options: cri_pb2.SELinuxOption, node: NodeFacts, *, privileged: bool = False, level: str = ""
) -> SelinuxLabels:
    """The labels for ``options``. Missing parts are completed. ``level`` is the pod's own level.

    The given parts are always checked; the kernel checks the whole label if it has a policy. Without SELinux on the
    node, or for privileged containers, there are no labels.
    """
    for field, word in (("user", options.user), ("role", options.role), ("type", options.type)):
        if word and not _WORD.fullmatch(word):
            raise InvalidArgumentError(f"selinux_options: {field} {word!r} is not a part of an SELinux label")
    if options.level and not _LEVEL.fullmatch(options.level):
        raise InvalidArgumentError(f"selinux_options: level {options.level!r} does not have the form s0:c1,c2")
    if privileged or not node.selinux_enabled:
        return SelinuxLabels()
    user, role, kind = options.user or "system_u", options.role or "system_r", options.type or "container_t"
    level = options.level or level or "s0"
    labels = SelinuxLabels(f"{user}:{role}:{kind}:{level}", f"{user}:object_r:container_file_t:{level}")
    for label in (labels.process, labels.mount):
        _check(label)
    return labels


def _check(label: str) -> None:
    if not Path(CHECK).exists():
        return
    descriptor = os.open(CHECK, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(descriptor, label.encode() + b"\0")
    except OSError as error:
        raise InvalidArgumentError(
            f"selinux_options: the node's policy does not know the label {label}: {error.strerror}; install "
            "container-selinux, choose another label, or set runtime.selinux = false"
        ) from error
    finally:
        os.close(descriptor)
