"""The paths of an agent's files: the run folder, which is empty after a reboot, and the data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.options import RuntimeOptions


@dataclass(frozen=True, slots=True)
class SandboxFolder:
    """A sandbox's folder in the run folder."""

    path: Path

    @property
    def namespaces(self) -> Path:
        """Folder of the pinned namespaces."""
        return self.path / "ns"

    def pin(self, kind: str) -> Path:
        """Where the namespace of ``kind`` (net, ipc, uts, pid, user) is pinned."""
        return self.path / "ns" / kind

    @property
    def shm(self) -> Path:
        """The pod's /dev/shm."""
        return self.path / "shm"

    @property
    def files(self) -> Path:
        """The mount point of the file system with the three files below.

        Older versions had them in the folder itself.
        """
        return self.path / "files"

    @property
    def resolv_conf(self) -> Path:
        """The pod's resolver configuration."""
        return self._file("resolv.conf")

    @property
    def hosts(self) -> Path:
        """The hosts file for containers without one."""
        return self._file("hosts")

    @property
    def hostname(self) -> Path:
        """The pod's /etc/hostname."""
        return self._file("hostname")

    @property
    def kept_rows(self) -> Path:
        """The store's rows of the sandbox, written by runtime.recovery.kept_rows."""
        return self.path / "rows"

    def _file(self, name: str) -> Path:
        return (self.files if self.files.exists() else self.path) / name


@dataclass(frozen=True, slots=True)
class ContainerFolder:
    """A container's bundle in the run folder."""

    path: Path

    @property
    def rootfs(self) -> Path:
        """Where the container's overlay is mounted."""
        return self.path / "rootfs"

    def image_volume(self, index: int) -> Path:
        """The mount point of the image of mount number ``index``."""
        return self.path / "images" / str(index)

    def image_volumes_there(self) -> list[Path]:
        """The mount points of images, also of images that are no longer mounted."""
        folder = self.path / "images"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    @property
    def spec(self) -> Path:
        """The OCI runtime's configuration."""
        return self.path / "config.json"

    @property
    def monitor_log(self) -> Path:
        """The log of conmon itself."""
        return self.path / "monitor.log"

    @property
    def runtime_log(self) -> Path:
        """The output of the OCI runtime while it creates the container.

        Otherwise it would be in the container's log.
        """
        return self.path / "runtime.log"

    @property
    def control(self) -> Path:
        """Conmon's control fifo."""
        return self.path / "ctl"

    @property
    def out_of_memory(self) -> Path:
        """conmon makes this file when the kernel killed a process of the container for its memory limit."""
        return self.path / "oom"

    @property
    def kept_rows(self) -> Path:
        """The store's rows of the container, written by runtime.recovery.kept_rows."""
        return self.path / "rows"

    @property
    def survived_kills(self) -> Path:
        """The kills for memory that the first process survived, written by runtime.containers.endings.kill_watch."""
        return self.path / "survived-kills"


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one agent."""

    data: Path
    run: Path

    @classmethod
    def of(cls, options: RuntimeOptions) -> Layout:
        """The folders in ``options``, as absolute paths."""
        return cls(Path(options.data_dir).absolute(), Path(options.run_dir).absolute())

    @property
    def database(self) -> Path:
        """The store."""
        return self.data / "podkeel.db"

    @property
    def database_copy(self) -> Path:
        """The copy of the store, for a start if the store is lost."""
        return self.data / "podkeel-copy.db"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint that is being made; otherwise empty."""
        return self.data / "checkpoints"

    @property
    def sandboxes(self) -> Path:
        """Folder of sandbox folders."""
        return self.run / "sandboxes"

    @property
    def containers(self) -> Path:
        """Folder of bundles."""
        return self.run / "containers"

    @property
    def exits(self) -> Path:
        """conmon writes exit codes here, a file per container."""
        return self.run / "exits"

    @property
    def node_mounts(self) -> Path:
        """The records of mounts on the node, written by runtime.containers.bundle.node_mounts."""
        return self.run / "node-mounts"

    def sandbox(self, sandbox_id: str) -> SandboxFolder:
        """The folder of one sandbox."""
        return SandboxFolder(self.sandboxes / sandbox_id)

    def container(self, container_id: str) -> ContainerFolder:
        """The bundle of one container."""
        return ContainerFolder(self.containers / container_id)

    def runtime_root(self, handler: str) -> Path:
        """State folder of one OCI runtime."""
        return self.run / "oci" / handler

    def runtime_program(self, handler: str) -> Path:
        """The path of the OCI runtime's copy in memory."""
        return self.run / "programs" / handler

    @property
    def mask(self) -> Path:
        """The null device that masks files of containers."""
        return self.run / "mask" / "null"

    def make(self) -> None:
        """Create the fixed folders. Existing ones are no error."""
        self.data.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.run.mkdir(mode=0o711, parents=True, exist_ok=True)
        for folder in (self.sandboxes, self.containers):  # the root of a user namespace must be able to enter them
            folder.mkdir(mode=0o711, exist_ok=True)
        for folder in (self.exits, self.run / "oci"):
            folder.mkdir(mode=0o700, exist_ok=True)
