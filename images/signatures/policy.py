"""The node's policy about signatures of images, and which part of it an image falls under.

Document: containers-policy.json(5). Of its transports, ``docker`` is the one that a pull uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from host import untrusted_json
from host.errors import KubeletReasonError
from host.untrusted_json import JsonError
from images.oci.reference import Reference
from images.options import DEFAULT_POLICY, ImageOptions
from images.signatures.requirements import AcceptAnything, Reject, Requirement, SignedBy, SigstoreSigned, describe

_TRANSPORT = "docker"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default: tuple[Requirement, ...]
    transports: dict[str, dict[str, tuple[Requirement, ...]]] = {}

    def __post_init__(self) -> None:
        lists = [self.default, *(found for scopes in self.transports.values() for found in scopes.values())]
        if not all(lists):
            raise ValueError("a list of requirements is empty")


@dataclass(frozen=True, slots=True)
class Rule:
    """The part of the policy that holds for an image: all ``requirements`` must be met."""

    policy: str
    scope: str
    requirements: tuple[Requirement, ...]

    @property
    def title(self) -> str:
        """For messages: the file and the scope."""
        return f"policy {self.policy}, {self.scope}"

    @property
    def needs_signatures(self) -> bool:
        """Whether signatures must be fetched."""
        return any(isinstance(found, (SignedBy, SigstoreSigned)) for found in self.requirements)

    @property
    def rejects(self) -> bool:
        """Whether no image is accepted."""
        return any(isinstance(found, Reject) for found in self.requirements)

    @property
    def accepts_anything(self) -> bool:
        """Whether every image is accepted."""
        return all(isinstance(found, AcceptAnything) for found in self.requirements)

    def describe(self) -> str:
        """The rule in one line."""
        return f"{self.title}: {'; '.join(map(describe, self.requirements))}"


def rule_for(options: ImageOptions, name: Reference) -> Rule | None:
    """The rule for ``name`` in the file of the configuration, which is read now; None where there is no policy. Blocks.

    The default file may be missing. Raises KubeletReasonError ``SignatureValidationFailed`` if another one is, and if
    the file is broken: nothing can be pulled then.
    """
    if not options.signature_policy:
        return None
    path = Path(options.signature_policy)
    try:
        content = untrusted_json.read_file(path)
    except FileNotFoundError as error:
        if options.signature_policy == DEFAULT_POLICY:
            return None
        raise _broken(path, "it is missing (images.signature_policy)") from error
    except (OSError, JsonError) as error:
        raise _broken(path, str(error)) from error
    try:
        found = _decoded(content)
    except (JsonError, ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from error
    scopes = found.transports.get(_TRANSPORT, {})
    for scope in scopes_of(name):
        if scope in scopes:
            return Rule(str(path), f"scope {scope}", scopes[scope])
    if "" in scopes:
        return Rule(str(path), f"default of {_TRANSPORT}", scopes[""])
    return Rule(str(path), "default", found.default)


def scopes_of(name: Reference) -> Iterator[str]:
    """The scopes that ``name`` is in, the closest first, as both containers' policy and registries.d have them."""
    if name.digest:
        yield f"{name.repository}@{name.digest}"
    if name.tag:
        yield name.tagged
    scope = name.repository
    while scope:
        yield scope
        scope = scope.rpartition("/")[0]
    domain = name.domain.partition(":")[0]
    while "." in domain:
        domain = domain.partition(".")[2]
        yield f"*.{domain}"


def _decoded(content: bytes) -> _File:
    untrusted_json.decode(content, Any)  # its limits
    return msgspec.convert(json.loads(content, object_pairs_hook=_unique), _File)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return members


def _broken(path: Path, why: str) -> KubeletReasonError:
    return KubeletReasonError("SignatureValidationFailed", f"the policy {path} cannot be used: {why}")
