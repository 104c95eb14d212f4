"""Container Device Interface: vendors describe devices in files, each with edits for a container's spec.

Follows the CDI specification up to 1.0. Network devices and Intel RDT settings are refused, not ignored.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError, UnsupportedError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config as oci

FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""The folders of descriptions. Those of a later folder replace those of an earlier one."""

ANNOTATION_PREFIX = "cdi.k8s.io/"

_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"([a-zA-Z0-9][\w.-]*/[a-zA-Z][\w.-]*)=([a-zA-Z0-9]([\w.:-]*[a-zA-Z0-9])?)", re.ASCII)


Unsigned = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class _Struct(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    """The base of all parts of a description."""


class DeviceNode(_Struct, frozen=True):
    """A device to create. Values that are not set are taken from the host's device."""

    path: str
    host_path: str = ""
    type: Literal["", "b", "c", "u", "p"] = ""
    major: Unsigned | None = None
    minor: Unsigned | None = None
    file_mode: Unsigned | None = None
    permissions: str = ""
    uid: Unsigned | None = None
    gid: Unsigned | None = None


class BindMount(_Struct, frozen=True):
    """A mount with options of mount(8)."""

    host_path: str
    container_path: str
    options: list[str] = []
    type: str = ""


class EditHook(_Struct, frozen=True):
    """A program that the OCI runtime runs at the point ``hook_name``. ``timeout`` in seconds."""

    hook_name: Literal["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: Annotated[int, msgspec.Meta(lt=1 << 31)] | None = None


class Edits(_Struct, frozen=True):
    """The changes to a container's spec for a device."""

    env: list[str] = []
    device_nodes: list[DeviceNode] = []
    mounts: list[BindMount] = []
    hooks: list[EditHook] = []
    additional_gids: list[Unsigned] = msgspec.field(name="additionalGids", default=[])
    intel_rdt: Any = None
    net_devices: Any = None


class DescribedDevice(_Struct, frozen=True):
    """One device of a description."""

    name: str
    container_edits: Edits
    annotations: dict[str, str] = {}


class Description(_Struct, frozen=True):
    """One file. Its own edits apply to each container that gets one of its devices."""

    cdi_version: str
    kind: str
    devices: list[DescribedDevice]
    container_edits: Edits = Edits()
    annotations: dict[str, str] = {}


def requested(config: cri_pb2.ContainerConfig) -> list[str]:
    """The names of the devices that a configuration requests, in its field or in the older annotations."""
    names = [device.name for device in config.CDI_devices]
    for key, value in config.annotations.items():
        if key.startswith(ANNOTATION_PREFIX):
            names += value.split(",")
    return list(dict.fromkeys(names))


def edits_for(
    names: Sequence[str], folders: Iterable[Path] = FOLDERS, asked_by: Mapping[str, str] | None = None
) -> list[Edits]:
    """The edits of each named device (``vendor.com/class=name``), each after the edits of its file, which come once.

    ``asked_by`` has the name in errors for devices that are not of the configuration.
    Raises InvalidArgumentError for an invalid name, and for one that no file, or more than one of a folder, describes.
    """
    if not names:
        return []
    devices, problems = _known_devices(folders)
    edits: list[Edits] = []
    used: list[Description] = []
    for name in names:
        title = (asked_by or {}).get(name, "CDI device")
        if not _NAME.fullmatch(name):
            raise InvalidArgumentError(f"{title} {name!r} does not have the form vendor.com/class=name")
        found = devices.get(name, ())
        if len(found) != 1:
            where = "is described by more than one file" if found else "is not described by any file"
            noted = f" ({'; '.join(problems)})" if problems else ""
            raise InvalidArgumentError(
                f"{title} {name} {where} in {', '.join(map(str, folders))}{noted}: "
                "have its driver write one description of it"
            )
        description, device = found[0]
        if description not in used:
            used.append(description)
            edits.append(description.container_edits)
        edits.append(device.container_edits)
    for edit in edits:
        if edit.intel_rdt or edit.net_devices:
            raise UnsupportedError(
                f"CDI devices {', '.join(names)} ask for intelRdt or netDevices, which are not supported: remove them"
            )
    return edits


_Known = Mapping[str, Sequence[tuple[Description, DescribedDevice]]]


def _known_devices(folders: Iterable[Path]) -> tuple[_Known, list[str]]:
    devices: dict[str, list[tuple[Description, DescribedDevice]]] = {}
    problems: list[str] = []
    for folder in folders:
        here: dict[str, list[tuple[Description, DescribedDevice]]] = {}
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in (path for path in files if path.suffix in (".json", ".yaml", ".yml")):
            try:
                status = path.stat()
                description = _read(path, status.st_mtime_ns, status.st_size)
            except (OSError, ValueError) as error:
                problems.append(f"{path}: {error}")
                continue
            for device in description.devices:
                here.setdefault(f"{description.kind}={device.name}", []).append((description, device))
        devices |= here
    return devices, problems


@lru_cache(maxsize=64)
def _read(path: Path, _changed: int, _size: int) -> Description:
    """Raises OSError and ValueError (JsonError and msgspec's errors are ValueErrors; YAML's are converted)."""
    content = untrusted_json.read_file(path, _MAX_FILE_BYTES)
    if path.suffix == ".json":
        return untrusted_json.decode(content, Description, max_bytes=_MAX_FILE_BYTES)
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # SafeLoader is a hundred times slower
    try:
        _check_shape(yaml.parse(content, Loader=loader))
        return msgspec.convert(yaml.load(content, Loader=loader), type=Description)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def _check_shape(events: Iterable[Any]) -> None:
    """Check limits as for JSON. Aliases are refused, because a few of them can expand to more than the memory."""
    depth = 0
    for values, event in enumerate(events):
        match type(event).__name__:
            case "AliasEvent":
                raise ValueError("YAML with aliases (*) is not supported: write out their values")
            case "MappingStartEvent" | "SequenceStartEvent":
                depth += 1
            case "MappingEndEvent" | "SequenceEndEvent":
                depth -= 1
        if depth > untrusted_json.DEEPEST or values > untrusted_json.MAX_VALUES:
            raise ValueError(
                f"it holds more than {untrusted_json.MAX_VALUES} values or nests more than "
                f"{untrusted_json.DEEPEST} within each other"
            )


def hooks(edits: Iterable[Edits]) -> oci.Hooks | None:
    """The hooks of all edits, in their order."""
    found = oci.Hooks()
    for edit in edits:
        for hook in edit.hooks:
            if not hook.path.startswith("/"):
                raise InvalidArgumentError(f"CDI: hook {hook.path!r} is not an absolute path: correct the description")
            made = oci.Hook(path=hook.path, args=hook.args, env=hook.env, timeout=hook.timeout)
            getattr(found, _HOOK_FIELDS[hook.hook_name]).append(made)
    return None if found == oci.Hooks() else found


_HOOK_FIELDS = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}


def mounts(edits: Iterable[Edits]) -> list[oci.Mount]:
    """The mounts of all edits. A mount without a type is a bind mount."""
    made = []
    for edit in edits:
        for mount in edit.mounts:
            if not mount.container_path.startswith("/") or ".." in mount.container_path.split("/"):
                raise InvalidArgumentError(
                    f"CDI: mount {mount.container_path!r} is not an absolute path without '..': correct the description"
                )
            kind = mount.type or "bind"
            if posixpath.normpath("/" + mount.container_path.lstrip("/")) == "/dev":
                raise InvalidArgumentError("CDI: a mount at /dev hides the container's devices: list deviceNodes")
            options = mount.options
            if kind == "bind" and not {"bind", "rbind"} & set(options):
                options = ["rbind", *options]
            made.append(
                oci.Mount(destination=mount.container_path, type=kind, source=mount.host_path, options=list(options))
            )
    return made


def environment(edits: Iterable[Edits]) -> dict[str, str]:
    """The variables of all edits. The last value for a name is used."""
    return {
        name: value
        for edit in edits
        for name, equals, value in (entry.partition("=") for entry in edit.env)
        if name and equals
    }
