"""``--volume`` of the commands that restore."""

from __future__ import annotations

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2


def read_volume(text: str) -> cri_pb2.Mount:
    """The mount that HOST:CONTAINER[:ro] asks for. Raises InvalidArgumentError."""
    source, _, place = text.partition(":")
    place, _, mode = place.partition(":")
    if not source.startswith("/") or not place.startswith("/") or mode not in ("", "ro"):
        raise InvalidArgumentError(f"--volume {text}: expected HOST:CONTAINER or HOST:CONTAINER:ro, absolute paths")
    return cri_pb2.Mount(host_path=source, container_path=place, readonly=mode == "ro")
