"""Which plugin changed what of a container: two that change the same thing conflict."""

from __future__ import annotations

from dataclasses import dataclass, field

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2

Field = nri_pb2.Field


class ConflictError(InvalidArgumentError):
    """Two plugins set the same thing."""


@dataclass(slots=True)
class Owners:
    """The owner of each field of one container; compound fields have one for each key."""

    subject: str
    simple: dict[int, str] = field(default_factory=dict)
    compound: dict[int, dict[str, str]] = field(default_factory=dict)

    def claim(self, number: Field, plugin: str) -> None:
        """Make ``plugin`` the owner of a field. Raises ConflictError when another plugin is."""
        owner = self.simple.setdefault(number, plugin)
        if owner != plugin:
            raise ConflictError(f"{self.subject}: NRI plugins {owner} and {plugin} both set {Field.Name(number)}")

    def claim_key(self, number: Field, key: str, plugin: str) -> None:
        """The same for one key of a compound field."""
        owner = self.compound.setdefault(number, {}).setdefault(key, plugin)
        if owner != plugin:
            raise ConflictError(
                f"{self.subject}: NRI plugins {owner} and {plugin} both set {Field.Name(number)} {key!r}"
            )

    def add(self, number: Field, plugin: str) -> None:
        """Make ``plugin`` one of the owners of a field that several may add to."""
        names = self.simple[number].split(",") if number in self.simple else []
        self.simple[number] = ",".join(dict.fromkeys((*names, plugin)))

    def clear(self, number: Field) -> None:
        """Let the next plugin own a field: this one removed what was set."""
        self.simple.pop(number, None)

    def clear_key(self, number: Field, key: str) -> None:
        """The same for one key of a compound field."""
        self.compound.get(number, {}).pop(key, None)

    def message(self) -> nri_pb2.FieldOwners:
        """The owners as plugins and the store know them."""
        message = nri_pb2.FieldOwners(simple=self.simple)
        for number, owners in self.compound.items():
            if owners:
                message.compound[number].owners.update(owners)
        return message
