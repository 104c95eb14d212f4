"""Records which plugin changed each field of a container. Two plugins that change the same field conflict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2

Field = nri_pb2.Field
REMOVAL = "-"
"""Begins the name of an entry that is removed, and the name of the plugin that removed it."""


class ConflictError(InvalidArgumentError):
    """Two plugins set the same field."""


@dataclass(slots=True)
class Owners:
    """The owner of each field of one container. Compound fields have one owner for each key.

    If a plugin removed a value, its name is recorded with a leading ``-``, and the next plugin may set the value.
    """

    subject: str
    simple: dict[int, str] = field(default_factory=dict)
    compound: dict[int, dict[str, str]] = field(default_factory=dict)

    def claim(self, number: Field, plugin: str) -> None:
        """Make ``plugin`` the owner of a field. Raises ConflictError if another plugin owns it."""
        self._claim(self.simple, number, plugin, Field.Name(number))

    def claim_key(self, number: Field, key: str, plugin: str) -> None:
        """Make ``plugin`` the owner of one key of a compound field. Raises ConflictError if another plugin owns it."""
        self._claim(self.compound.setdefault(number, {}), key, plugin, f"{Field.Name(number)} {key!r}")

    def _claim(self, owners: dict[Any, str], key: object, plugin: str, what: str) -> None:
        owner = owners.get(key, plugin)
        if owner != plugin and not owner.startswith(REMOVAL):
            raise ConflictError(f"{self.subject}: NRI plugins {owner} and {plugin} both set {what}")
        owners[key] = plugin

    def add(self, number: Field, plugin: str) -> None:
        """Make ``plugin`` one of the owners of a field to which several plugins may add."""
        names = self.simple[number].split(",") if number in self.simple else []
        self.simple[number] = ",".join(dict.fromkeys((*names, plugin)))

    def clear(self, number: Field, plugin: str) -> None:
        """Record that ``plugin`` removed the value of a field, so that the next plugin may set it."""
        self.simple[number] = REMOVAL + plugin

    def clear_key(self, number: Field, key: str, plugin: str) -> None:
        """Record that ``plugin`` removed one key of a compound field."""
        self.compound.setdefault(number, {})[key] = REMOVAL + plugin

    def names(self) -> str:
        """The names of all owners, for messages."""
        keyed = (name for owners in self.compound.values() for name in owners.values())
        return ", ".join(sorted({*self.simple.values(), *keyed}))

    def message(self) -> nri_pb2.FieldOwners:
        """The owners as a message for plugins."""
        message = nri_pb2.FieldOwners(simple=self.simple)
        for number, owners in self.compound.items():
            if owners:
                message.compound[number].owners.update(owners)
        return message

    def changes(self) -> dict[str, str]:
        """The owners in the form of the function ``changes``."""
        return changes(self.message())


def changes(owners: nri_pb2.FieldOwners) -> dict[str, str]:
    """The plugin for each change, for people: ``Env NAME``, or ``-Env NAME`` for a removed value."""
    named = [(Field.Name(cast(Field, number)), owner) for number, owner in owners.simple.items()]
    for number, keys in owners.compound.items():
        named += [(f"{Field.Name(cast(Field, number))} {key}", owner) for key, owner in keys.owners.items()]
    return {
        REMOVAL + name if owner.startswith(REMOVAL) else name: owner.removeprefix(REMOVAL)
        for name, owner in sorted(named)
    }
