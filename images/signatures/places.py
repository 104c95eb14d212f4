"""Where the signatures of an image are: containers' registries.d.

Document: containers-registries.d(5).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from host import untrusted_json
from host.errors import KubeletReasonError
from host.untrusted_json import JsonError
from images.oci.reference import Reference
from images.signatures.policy import scopes_of

DEFAULT_LOOKASIDE = "file:///var/lib/containers/sigstore"

_MAX_FILES = 1000


class _Section(msgspec.Struct, frozen=True, rename="kebab"):
    """Unknown keys belong to other programs."""

    lookaside: str | None = None
    sigstore: str | None = None  # the old name of lookaside
    use_sigstore_attachments: bool | None = None


class _File(msgspec.Struct, frozen=True, rename="kebab"):
    default_docker: _Section | None = None
    docker: dict[str, _Section] | None = None


class Places(msgspec.Struct, frozen=True):
    """``lookaside`` is the address below which simple signatures are; ``attachments`` says whether the registry itself
    may be asked for sigstore signatures.
    """

    lookaside: str
    attachments: bool


def places_for(folder: str, name: Reference) -> Places:
    """Where signatures of ``name`` are, as the files of ``folder`` say now; a missing folder says nothing. Blocks.

    Raises KubeletReasonError ``SignatureValidationFailed`` for a file that cannot be used, and for scopes that two
    files have.
    """
    default: _Section | None = None
    scopes: dict[str, _Section] = {}
    for path in _files(folder):
        found = _read(path)
        for scope, section in (found.docker or {}).items():
            if scope in scopes:
                raise _broken(path, f"{scope!r} is configured in another file too")
            scopes[scope] = section
        if found.default_docker is not None:
            if default is not None:
                raise _broken(path, "default-docker is configured in another file too")
            default = found.default_docker
    section = next((scopes[scope] for scope in scopes_of(name) if scope in scopes), default) or _Section()
    lookaside = section.lookaside or section.sigstore or DEFAULT_LOOKASIDE
    return Places(lookaside, section.use_sigstore_attachments is not False)


def _files(folder: str) -> list[Path]:
    if not folder:
        return []
    try:
        found = sorted(path for path in Path(folder).iterdir() if path.suffix == ".yaml")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _broken(Path(folder), error.strerror or str(error)) from error
    if len(found) > _MAX_FILES:
        raise _broken(Path(folder), f"it has more than {_MAX_FILES} files")
    return found


def _read(path: Path) -> _File:
    try:
        content: Any = yaml.safe_load(untrusted_json.read_file(path))
        return msgspec.convert(content or {}, _File)
    except (OSError, JsonError, yaml.YAMLError, msgspec.ValidationError, RecursionError) as error:
        raise _broken(path, " ".join(str(error).split())) from error


def _broken(path: Path, why: str) -> KubeletReasonError:
    return KubeletReasonError("SignatureValidationFailed", f"{path} cannot be used (images.registries_dir): {why}")
