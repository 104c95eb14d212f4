"""Volumes of a Pod manifest: emptyDir and hostPath, as folders and files of the node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cli.manifest.fields import Fields
from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2

_HOST_PATH_TYPES = (
    "",
    "Directory",
    "DirectoryOrCreate",
    "File",
    "FileOrCreate",
    "Socket",
    "CharDevice",
    "BlockDevice",
)
_PROPAGATION = {
    "None": cri_pb2.PROPAGATION_PRIVATE,
    "HostToContainer": cri_pb2.PROPAGATION_HOST_TO_CONTAINER,
    "Bidirectional": cri_pb2.PROPAGATION_BIDIRECTIONAL,
}


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume by its name; ``kind`` is ``emptyDir``, a hostPath type, or empty for a kind that is not supported."""

    name: str
    path: Path
    kind: str
    supported: bool = True

    def prepare(self) -> None:
        """Make the folder or file of a kind that makes one.

        Raises InvalidArgumentError if a path that must exist is missing.
        """
        match self.kind:
            case "emptyDir":
                self.path.mkdir(parents=True, exist_ok=True)
                self.path.chmod(0o777)
            case "DirectoryOrCreate":
                self.path.mkdir(parents=True, exist_ok=True)
            case "FileOrCreate":
                self.path.touch()
        checks = {
            "Directory": self.path.is_dir,
            "File": self.path.is_file,
            "Socket": self.path.is_socket,
            "CharDevice": self.path.is_char_device,
            "BlockDevice": self.path.is_block_device,
        }
        if self.kind in checks and not checks[self.kind]():
            raise InvalidArgumentError(f"volume {self.name!r}: {self.path} is no {self.kind} on this node")


def read_volumes(spec: Fields, folder: Path) -> list[Volume]:
    """The volumes of a pod's spec; emptyDirs are made below ``folder``."""
    found: list[Volume] = []
    for fields in spec.children("volumes"):
        name = fields.required_text("name")
        if PurePosixPath(name).parts != (name,) or name == "..":
            raise InvalidArgumentError(f"{fields.at('name')}: {name!r} cannot name a volume")
        if "hostPath" in fields:
            host = fields.child("hostPath")
            path = Path(host.required_text("path"))
            if not path.is_absolute():
                raise InvalidArgumentError(f"{host.at('path')}: {path} is not an absolute path")
            found.append(Volume(name, path, host.choice("type", _HOST_PATH_TYPES, "")))
            host.finish()
        elif "emptyDir" in fields:
            fields.child("emptyDir").finish()
            found.append(Volume(name, folder / name, "emptyDir"))
        else:
            found.append(Volume(name, folder / name, "", supported=False))
    return found


def mount(fields: Fields, volumes: list[Volume]) -> cri_pb2.Mount:
    """One entry of volumeMounts."""
    name = fields.required_text("name")
    volume = next((item for item in volumes if item.name == name), None)
    if volume is None:
        raise InvalidArgumentError(f"{fields.at('name')}: the pod has no volume {name!r}")
    if not volume.supported:
        raise InvalidArgumentError(
            f"{fields.path}: volume {name!r} is neither an emptyDir nor a hostPath; podkeel run knows only these"
        )
    part = PurePosixPath(fields.text("subPath"))
    if part.is_absolute() or ".." in part.parts:
        raise InvalidArgumentError(f"{fields.at('subPath')}: {part} must stay inside the volume")
    return cri_pb2.Mount(
        container_path=fields.required_text("mountPath"),
        host_path=str(volume.path / part),
        readonly=fields.flag("readOnly"),
        propagation=_PROPAGATION[fields.choice("mountPropagation", tuple(_PROPAGATION), "None")],
    )
