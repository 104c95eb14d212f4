"""Read the fields of a YAML document: a wrong type is an error, and each field that was not read gets a warning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import TypeVar

from host.errors import InvalidArgumentError
from host.quantities import quantity

T = TypeVar("T", str, bool, int)


class Fields:
    """One mapping of the document; ``path`` (``spec.containers[0]``) names it in errors and warnings.

    Every getter marks its field as read; a missing or null field gives the default. ``warnings`` is shared by the whole
    document.
    """

    def __init__(self, value: object, path: str, warnings: list[str]) -> None:
        if not isinstance(value, dict):
            raise InvalidArgumentError(
                f"{path or 'the manifest'}: expected a mapping, got {json.dumps(value, default=str)}"
            )
        self._values: dict[str, object] = {str(key): item for key, item in value.items()}
        self._unread = {key for key, item in self._values.items() if item is not None}
        self.path = path
        self.warnings = warnings

    def at(self, key: str) -> str:
        """The full path of a field."""
        return f"{self.path}.{key}" if self.path else key

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        return self._plain(key, str, "a string (quote it)", default)

    def required_text(self, key: str) -> str:
        """A string. Raises InvalidArgumentError if it is missing or empty."""
        value = self.text(key)
        if not value:
            raise InvalidArgumentError(f"{self.at(key)} must be given")
        return value

    def flag(self, key: str) -> bool:
        """True or false, false if missing."""
        return self._plain(key, bool, "true or false", False)

    def whole(self, key: str) -> int | None:
        """A whole number, if there is one."""
        return self._plain(key, int, "a whole number", 0) if key in self else None

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of ``allowed``."""
        value = self.text(key, default)
        if value not in allowed:
            raise InvalidArgumentError(f"{self.at(key)}: expected one of {', '.join(allowed)}, got {value!r}")
        return value

    def quantity(self, key: str) -> Fraction | None:
        """A Kubernetes quantity as text; None if it is not given. YAML reads a quantity without a unit as a number."""
        value = self._take(key)
        if value is None:
            return None
        try:
            return quantity(str(value))
        except ValueError as error:
            raise InvalidArgumentError(f"{self.at(key)}: {error}") from error

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        values = self._list(key)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise self._wrong(f"{key}[{index}]", "a string (quote it)", value)
        return [str(value) for value in values]

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers."""
        values = self._list(key)
        for index, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool):
                raise self._wrong(f"{key}[{index}]", "a whole number", value)
        return [value for value in values if isinstance(value, int)]

    def string_map(self, key: str) -> dict[str, str]:
        """A mapping of strings."""
        values = self.child(key)
        return {name: values.text(name) for name in values.names()}

    def names(self) -> list[str]:
        """The keys of this mapping."""
        return list(self._values)

    def child(self, key: str) -> Fields:
        """A mapping; empty if missing."""
        value = self._take(key)
        return Fields({} if value is None else value, self.at(key), self.warnings)

    def children(self, key: str) -> Iterator[Fields]:
        """The mappings of a list. Warnings for a mapping are added when the next one is taken."""
        for index, value in enumerate(self._list(key)):
            item = Fields(value, f"{self.at(key)}[{index}]", self.warnings)
            yield item
            item.finish()

    def skip(self, *keys: str) -> None:
        """Mark fields as read that have no effect in ``podkeel run``, so that no warning names them."""
        self._unread -= set(keys)

    def finish(self) -> None:
        """Add a warning for every field that was not read."""
        self.warnings += [f"{self.at(key)} is not supported and has no effect" for key in sorted(self._unread)]
        self._unread = set()

    def _take(self, key: str) -> object:
        self._unread.discard(key)
        return self._values.get(key)

    def _plain(self, key: str, kind: type[T], noun: str, default: T) -> T:
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._wrong(key, noun, value)
        return value

    def _list(self, key: str) -> list[object]:
        value = self._take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(key, "a list", value)
        return value

    def _wrong(self, key: str, noun: str, value: object) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self.at(key)}: expected {noun}, got {json.dumps(value, default=str)}")
