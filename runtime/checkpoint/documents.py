"""The documents of a checkpoint archive, in the form that podman, CRI-O and checkpointctl read."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.message import Message

from host.errors import UnsupportedError
from host.files.file_tree import shown
from runtime.specgen import config
from runtime.state.container import Container
from runtime.state.status import container_status

CONFIG, SPEC, STATUS = "config.dump", "spec.dump", "status.dump"
IMAGES, DIFF, DELETED = "checkpoint", "rootfs-diff.tar", "deleted.files"
LOG, CRIU_LOG, STATISTICS = "container.log", "dump.log", "stats-dump"
NETWORK, BIND_MOUNTS, VOLUMES, SHARED_MEMORY = "network.status", "bind.mounts", "volumes", "devshm-checkpoint.tar"


class ConfigDump(msgspec.Struct, rename="camel"):
    """``config.dump``: the checkpointed container, its image, and its OCI runtime. Times have the form of RFC 3339."""

    id: str = ""
    name: str = ""
    rootfs_image: str = ""
    rootfs_image_ref: str = ""
    rootfs_image_name: str = ""
    runtime: str = ""
    created_time: str = ""
    checkpointed_time: str = ""
    restored_time: str = ""
    restored: bool = False


class BindMount(msgspec.Struct):
    """An item of ``bind.mounts``: a path in the container with a bind mount, and its kind."""

    source: str
    destination: str
    file_type: str
    permissions: int


def config_dump(container: Container) -> bytes:
    """Make ``config.dump``."""
    record, image = container.record, container.config.image
    return _encoded(
        ConfigDump(
            id=container.id,
            name=container.config.metadata.name,
            rootfs_image=record.image_id,
            rootfs_image_ref=record.image_ref,
            rootfs_image_name=record.restored_image or image.user_specified_image or image.image,
            runtime=record.handler,
            created_time=rfc3339(record.created_at),
            checkpointed_time=rfc3339(time.time_ns()),
            restored_time=rfc3339(0),
        )
    )


def status_dump(container: Container) -> bytes:
    """Make ``status.dump``: the CRI's ContainerStatus with the names of its fields; numbers are numbers."""
    return _encoded(_plain(container_status(container)))


def network_status(container: Container) -> bytes:
    """Make ``network.status``: the addresses of the pod."""
    return _encoded({"addresses": list(container.sandbox.record.addresses)})


def bind_mounts(mounts: list[config.Mount]) -> bytes:
    """Make ``bind.mounts``."""
    found = []
    for mount in mounts:
        if mount.type != "bind":
            continue
        source = Path(mount.source)
        try:
            status = source.stat()
        except OSError:
            continue
        kind = "directory" if source.is_dir() else "file"
        found.append(BindMount(mount.source, mount.destination, kind, status.st_mode & 0o7777))
    return _encoded(found)


def deleted_files(removed: list[str]) -> bytes:
    """Make ``deleted.files``. Raises UnsupportedError for a name that JSON cannot represent."""
    for path in removed:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise UnsupportedError(
                f"the container removed {shown(path)} of its image: a checkpoint cannot record names that are not UTF-8"
            ) from error
    return _encoded(removed)


def rfc3339(nanoseconds: int) -> str:
    """A time in nanoseconds since the epoch in the form of RFC 3339. 0 becomes the year 1, as in Go for no time."""
    moment = datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{moment}.{nanoseconds % 10**9:09d}Z" if nanoseconds else "0001-01-01T00:00:00Z"


def _encoded(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2)


def _plain(message: Message) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values[field.name] = dict(value)
        elif field.message_type is not None:
            values[field.name] = [_plain(item) for item in value] if field.is_repeated else _plain(value)
        else:
            values[field.name] = list(value) if field.is_repeated else value
    return values
