"""The input for a spec besides the CRI's messages: the handler's abilities and the pod's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HandlerFacts:
    """The abilities of a runtime handler that change its specs.

    ``allowed_annotations`` are shell patterns of the annotations that are passed. ``compiled_seccomp``: it accepts a
    compiled filter, as crun does. ``makes_folders_inside``: it creates a missing working directory without following
    links out of the container's root. ``mask`` is the null device that masks files; None if the OCI runtime uses the
    container's own.
    """

    name: str
    recursive_read_only: bool = False
    privileged_without_host_devices: bool = False
    compiled_seccomp: bool = False
    makes_folders_inside: bool = False
    mask: Path | None = None
    allowed_annotations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SandboxFiles:
    """The pod's own files for its containers, on the host; None leaves one out.

    Without ``shm`` a container in the node's IPC namespace gets the node's /dev/shm.
    """

    resolv_conf: Path | None = None
    hosts: Path | None = None
    hostname: Path | None = None
    shm: Path | None = None
