"""Compares the seccomp filters of a checkpoint's threads with the filter of the new container's spec. Blocks."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from host.errors import InvalidArgumentError, UnsupportedError
from proto.criu.v1 import images_pb2
from runtime.checkpoint.restore import criu_images
from runtime.specgen import config

_FILTERED = 2
_ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC


def check_filters(folder: Path, threads: Mapping[int, images_pb2.Core], spec: config.Spec) -> None:
    """Raise InvalidArgumentError unless each of ``threads``, by number, gets the filter of ``spec``.

    CRIU saves filters that all threads of a process have only for the first thread, and sets them for all threads.
    Raises UnsupportedError if the OCI runtime does not get a compiled filter.
    """
    encoded = spec.annotations.get("run.oci.seccomp_bpf_data", "")
    if not encoded:
        raise UnsupportedError("its seccomp profile cannot be compared with that of the checkpoint")
    wanted = base64.b64decode(encoded)
    programs = criu_images.entries(folder / "seccomp.img", images_pb2.Seccomp)
    filters = [item for entry in programs for item in entry.seccomp_filters]
    missing = set(threads)
    for process in criu_images.entries(folder / "pstree.img", images_pb2.Process):
        leader = threads.get(process.pid)
        shares = leader is not None and any(
            item.filter == wanted and item.flags & _ALL_THREADS for item in _chain(leader, filters)
        )
        for number in {process.pid, *process.threads} & set(threads):
            core = threads[number]
            plain = not core.thread_core.seccomp_mode and not core.thread_core.HasField("seccomp_filter")
            if any(item.filter == wanted for item in _chain(core, filters)) or (shares and plain):
                missing.discard(number)
    if missing:
        raise InvalidArgumentError("a process of the checkpoint does not have the configuration's seccomp profile")


def _chain(core: images_pb2.Core, filters: Sequence[images_pb2.SeccompFilter]) -> Iterator[images_pb2.SeccompFilter]:
    """The filters of a thread. Each names the one before it."""
    thread = core.thread_core
    if thread.seccomp_mode != _FILTERED or not thread.HasField("seccomp_filter"):
        return
    number: int | None = thread.seccomp_filter
    for _ in filters:
        if number is None or number >= len(filters):
            return
        yield filters[number]
        number = filters[number].prev if filters[number].HasField("prev") else None
