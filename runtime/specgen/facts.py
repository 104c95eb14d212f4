"""The input for a spec besides the CRI's messages: the handler's abilities and the pod's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HandlerFacts:
    """A runtime handler as far as its specs differ.

    ``allowed_annotations`` are shell patterns of those passed on. ``compiled_seccomp`` says that it takes a filter that
    is compiled already, as crun does. ``makes_folders_inside``: it makes a missing working directory without following
    links out of the container's root. ``mask`` is the null device behind which files are hidden; None where the OCI
    runtime takes the container's own for that.
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
    """The pod's own files that containers see, on the host; None leaves one out.

    Without ``shm`` a container in the node's IPC namespace gets the node's /dev/shm.
    """

    resolv_conf: Path | None = None
    hosts: Path | None = None
    hostname: Path | None = None
    shm: Path | None = None
