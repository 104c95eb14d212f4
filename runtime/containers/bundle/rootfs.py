"""Mounts for a container on the host: its root file system, and images used as volumes (KEP-4639)."""

from __future__ import annotations

from pathlib import Path

from host.concurrency.threads import in_thread
from host.errors import KubeletReasonError, PodkeelError
from images.image import Image
from images.snapshots.store import SnapshotStore
from images.store import ImageStore
from proto.runtime.v1 import cri_pb2
from runtime.containers.bundle.idmapped_mounts import release
from runtime.containers.bundle.node_mounts import NodeMounts
from runtime.layout import ContainerFolder, Layout
from runtime.logs import LogLink
from runtime.oci import private_devices
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.security.selinux import container_labels
from runtime.state.container import Container


class Rootfs:
    """Mounts what a container needs from images, and unmounts everything that was mounted for it."""

    def __init__(self, images: ImageStore, snapshots: SnapshotStore, facts: NodeFacts, layout: Layout) -> None:
        self._images = images
        self._snapshots = snapshots
        self._facts = facts
        self.node_mounts = NodeMounts(layout.node_mounts)

    async def mount(self, container: Container, image: Image) -> None:
        """Mount the container's writable root file system."""
        await self._snapshots.prepare(
            container.id,
            image,
            target=container.folder.rootfs,
            user_namespace=_user_namespace(container),
            mount_label=self._mount_label(container),
        )

    async def mount_image_volumes(self, container: Container) -> dict[int, Path]:
        """Mount the images among the container's mounts read-only. Returns their folders by index in the configuration.

        Raises KubeletReasonError ``ImageVolumeMountFailed``.
        """
        mounted: dict[int, Path] = {}
        for index, mount in enumerate(container.config.mounts):
            if not mount.image.image:
                continue
            image = self._images.find(mount.image.image)
            if image is None:
                raise KubeletReasonError(
                    "ImageVolumeMountFailed",
                    f"{container.title}: image {mount.image.image!r} for {mount.container_path} is not on this node: "
                    "pull it first",
                )
            target = container.folder.image_volume(index)
            try:
                await self._snapshots.mount_image(
                    container.id,
                    image,
                    target=target,
                    user_namespace=_user_namespace(container),
                    mount_label=self._mount_label(container),
                )
            except PodkeelError as error:
                raise KubeletReasonError("ImageVolumeMountFailed", f"{container.title}: {error.message}") from error
            mounted[index] = target
        return mounted

    async def unmount(self, container: Container) -> None:
        """Unmount the root file system, image volumes, volumes with mapped ids, devices, the log, and mounts that
        appeared on the node. May be repeated.
        """
        await self.node_mounts.release(container.id)
        folder = container.folder
        for target in await in_thread(_release_volumes, folder):
            await self._snapshots.unmount(container.id, target)
        if container.record.restored_image:  # crun mounts it there while CRIU works, and may have been killed
            await self._snapshots.unmount(container.id, folder.path / "criu-root")
        await self._snapshots.unmount(container.id, folder.rootfs)

    async def remove(self, container: Container) -> None:
        """Delete the files that the container has written. Its root file system must be unmounted. May be repeated."""
        await self._snapshots.remove(container.id)

    def writable(self, container: Container) -> Path:
        """The container's folder in which its writable layer is."""
        return self._snapshots.upper(container.id).parent

    def status_mounts(self, mounts: list[cri_pb2.Mount]) -> list[bytes]:
        """The mounts for the container's status, encoded. Images have their id, as PullImage returns it."""
        shown = []
        for given in mounts:
            mount = cri_pb2.Mount()
            mount.CopyFrom(given)
            if mount.image.image and (image := self._images.find(mount.image.image)) is not None:
                mount.image.image_ref = image.id
            shown.append(mount.SerializeToString())
        return shown

    def _mount_label(self, container: Container) -> str:
        sandbox = container.sandbox
        return container_labels(container.config, sandbox.config, self._facts, level=sandbox.record.selinux_level).mount


def _user_namespace(container: Container) -> Path | None:
    sandbox = container.sandbox
    return sandbox.folder.pin("user") if sandbox.user_namespace else None


def _release_volumes(folder: ContainerFolder) -> list[Path]:
    """Unmount log, devices and volumes with mapped ids. Returns the folders on which images are still mounted."""
    release(folder.rootfs)
    LogLink(folder.path).release()
    private_devices.release(folder.rootfs)
    return folder.image_volumes_there()
