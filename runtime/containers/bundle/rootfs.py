"""Mounts for a container on the host: its root file system, and images used as volumes (KEP-4639)."""

from __future__ import annotations

from pathlib import Path

from host.concurrency.threads import in_thread
from host.errors import KubeletReasonError, PodkeelError
from images.image import Image
from proto.runtime.v1 import cri_pb2
from runtime.containers.bundle.idmapped_mounts import release
from runtime.layout import ContainerFolder
from runtime.logs import LogLink
from runtime.node import Node
from runtime.oci import private_devices
from runtime.specgen.security.selinux import container_labels
from runtime.state.container import Container


async def mount_root(node: Node, container: Container, image: Image) -> None:
    """Mount the container's writable root file system."""
    target = container.folder.rootfs
    await node.snapshots.prepare(
        container.id,
        image,
        target=target,
        user_namespace=_user_namespace(node, container),
        mount_label=_mount_label(node, container),
    )


def _user_namespace(node: Node, container: Container) -> Path | None:
    sandbox = container.sandbox
    return sandbox.folder.pin("user") if sandbox.user_namespace else None


def _mount_label(node: Node, container: Container) -> str:
    sandbox = container.sandbox
    return container_labels(container.config, sandbox.config, node.facts, level=sandbox.record.selinux_level).mount


async def mount_image_volumes(node: Node, container: Container) -> dict[int, Path]:
    """Mount the images among the container's mounts, read-only; their folders by index in the configuration.

    Raises KubeletReasonError ``ImageVolumeMountFailed``.
    """
    mounted: dict[int, Path] = {}
    for index, mount in enumerate(container.config.mounts):
        if not mount.image.image:
            continue
        image = node.images.find(mount.image.image)
        if image is None:
            raise KubeletReasonError(
                "ImageVolumeMountFailed",
                f"{container.title}: image {mount.image.image!r} for {mount.container_path} is not here: pull it first",
            )
        target = container.folder.image_volume(index)
        try:
            await node.snapshots.mount_image(
                container.id,
                image,
                target=target,
                user_namespace=_user_namespace(node, container),
                mount_label=_mount_label(node, container),
            )
        except PodkeelError as error:
            raise KubeletReasonError("ImageVolumeMountFailed", f"{container.title}: {error.message}") from error
        mounted[index] = target
    return mounted


async def unmount_all(node: Node, container: Container) -> None:
    """Unmount a container's root file system, image volumes, volumes with mapped ids, devices and log. Repeatable."""
    folder = container.folder
    for target in await in_thread(_release_volumes, folder):
        await node.snapshots.unmount(container.id, target)
    await node.snapshots.unmount(container.id, folder.rootfs)


def _release_volumes(folder: ContainerFolder) -> list[Path]:
    """Unbind the log and the volumes with mapped ids, unmount the devices; where images are still mounted."""
    release(folder.rootfs)
    LogLink(folder.path).release()
    private_devices.release(folder.rootfs)
    return folder.image_volumes_there()


def status_mounts(node: Node, mounts: list[cri_pb2.Mount]) -> list[bytes]:
    """The mounts as the status shows them, encoded: images with their id, as PullImage returns it."""
    shown = []
    for given in mounts:
        mount = cri_pb2.Mount()
        mount.CopyFrom(given)
        if mount.image.image and (image := node.images.find(mount.image.image)) is not None:
            mount.image.image_ref = image.id
        shown.append(mount.SerializeToString())
    return shown
