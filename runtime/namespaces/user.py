"""The namespaces of a pod with a user namespace (KEP-127).

A process with threads cannot unshare a user namespace. So a short-lived ``unshare`` (util-linux) creates all of them
together, so that the user namespace owns the others. They are pinned, and the process ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from host import processes
from host.errors import LimitError
from host.files import mounts
from runtime.layout import SandboxFolder
from runtime.specgen import config
from runtime.specgen.namespaces import map_file

_OPTIONS = {"user": "--user", "net": "--net", "ipc": "--ipc", "uts": "--uts"}
_READY = b"."

Mappings = tuple[Sequence[config.IDMapping], Sequence[config.IDMapping]]


def make_pins(folder: SandboxFolder, kinds: Sequence[str], mappings: Mappings) -> None:
    """Create a user namespace with these mappings, and namespaces of ``kinds`` that it owns, and pin them all.

    Blocks for some milliseconds: call it in a thread. If it fails, ``drop_namespaces`` removes what was pinned.
    """
    wanted = ["user", *kinds]
    uids, gids = mappings
    folder.namespaces.mkdir(mode=0o711)
    with _waiting_process([_OPTIONS[kind] for kind in wanted]) as pid:
        _write_mappings(Path(f"/proc/{pid}/uid_map"), uids)
        _write_mappings(Path(f"/proc/{pid}/gid_map"), gids)
        for kind in wanted:
            pin = folder.pin(kind)
            pin.touch(mode=0o444)
            mounts.bind(f"/proc/{pid}/ns/{kind}", pin)


@contextlib.contextmanager
def user_namespace(mappings: Mappings) -> Iterator[str]:
    """The path of a user namespace with these mappings.

    It exists until the block ends. Blocks for some milliseconds.
    """
    uids, gids = mappings
    with _waiting_process([_OPTIONS["user"]]) as pid:
        _write_mappings(Path(f"/proc/{pid}/uid_map"), uids)
        _write_mappings(Path(f"/proc/{pid}/gid_map"), gids)
        yield f"/proc/{pid}/ns/user"


@contextlib.contextmanager
def _waiting_process(options: Sequence[str]) -> Iterator[int]:
    """The pid of a process in the new namespaces. It waits until the block ends."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            descriptors = {0: theirs.fileno(), 1: theirs.fileno()}
            pid = processes.spawn(["unshare", *options, "cat"], descriptors=descriptors)
        try:
            if not _echoes(ours):  # an echo of cat shows that it runs, and that the namespaces exist
                raise LimitError(
                    "a user namespace could not be made: raise user.max_user_namespaces, or the other limits of "
                    "namespaces in /proc/sys/user"
                )
            yield pid
        finally:
            processes.kill_group(pid)
            os.waitpid(pid, 0)


def _echoes(peer: socket.socket) -> bool:
    try:
        peer.sendall(_READY)
        return peer.recv(1) == _READY
    except ConnectionError:
        return False


def make_private(folder: Path, mappings: Mappings | None) -> None:
    """Create the folder of a sandbox or container in the run folder, which only root may enter.

    It leads to secrets and to set-user-id programs of images. The root of the pod's user namespace, if the pod has one
    with these ``mappings``, can also enter it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if mappings is not None:
        os.chown(folder, -1, root_of(mappings)[1])
        folder.chmod(0o710)


def root_of(mappings: Mappings) -> tuple[int, int]:
    """The host's uid and gid for root inside. Checked mappings have exactly one of each."""
    uids, gids = mappings
    return _host_id(uids), _host_id(gids)


def _host_id(mappings: Sequence[config.IDMapping]) -> int:
    return next(mapping.host_id for mapping in mappings if mapping.container_id == 0)


def _write_mappings(path: Path, mappings: Sequence[config.IDMapping]) -> None:
    path.write_text(map_file(mappings))
