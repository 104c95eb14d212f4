"""Which changes of plugins a runtime handler and its node support, and which plugin made each change."""

from __future__ import annotations

from dataclasses import dataclass

from host.errors import InvalidArgumentError, UnsupportedError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.answers.owners import REMOVAL
from runtime.oci.oci_runtime import RuntimeFeatures
from runtime.specgen.node_facts import NodeFacts

Field = nri_pb2.Field


@dataclass(frozen=True, slots=True)
class RuntimeAbilities:
    """A runtime handler, the features that its OCI runtime reported when it was probed, and the node it runs on.

    ``block_io_file`` is the file with the node's classes of block I/O; it is empty if the node has none.
    """

    handler: str
    features: RuntimeFeatures
    node: NodeFacts
    systemd_cgroups: bool = False
    block_io_file: str = ""

    @property
    def title(self) -> str:
        """How errors name the OCI runtime."""
        return f"runtime handler {self.handler!r} ({self.features.version or 'of unknown version'})"


@dataclass(frozen=True, slots=True)
class FieldErrors:
    """Knows which plugin set each field, and makes the errors that name the plugin and the field."""

    owners: nri_pb2.FieldOwners

    def plugin(self, number: int, key: str = "") -> str:
        """The names of the plugins that own a field, or one key of it."""
        keys = self.owners.compound[number].owners if number in self.owners.compound else {}
        if number in self.owners.simple:
            names = [self.owners.simple[number]]
        else:
            names = [keys[name] for name in (key, key.removeprefix(REMOVAL)) if name in keys][:1] or list(keys.values())
        return ",".join(dict.fromkeys(name.removeprefix(REMOVAL) for name in names)) or "(unknown)"

    def subject(self, number: Field, key: str = "") -> str:
        """``NRI plugin NAME: FIELD key``: the beginning of every error."""
        named = f" {key}" if key else ""
        return f"NRI plugin {self.plugin(number, key)}: {Field.Name(number)}{named}"

    def invalid(self, number: Field, what: str, key: str = "") -> InvalidArgumentError:
        """The error for an invalid value."""
        return InvalidArgumentError(f"{self.subject(number, key)}: {what}")

    def unsupported(self, number: Field, what: str, key: str = "") -> UnsupportedError:
        """The error for a value that this node, its OCI runtime or this agent does not support."""
        return UnsupportedError(f"{self.subject(number, key)}: {what}")
