"""Ids of sandboxes and containers, and the search for one by a unique prefix."""

from __future__ import annotations

import bisect
import re
import secrets
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from host.errors import InvalidArgumentError, NotFoundError

_BYTES = 32
_ID = re.compile(r"[0-9a-f]{64}")


class Identified(Protocol):
    """Anything with an id."""

    @property
    def id(self) -> str:
        """64 hexadecimal characters."""


T = TypeVar("T", bound=Identified)


def new_id(agent_id: str) -> str:
    """64 hexadecimal characters. The last ones are the id of the agent that assigned it."""
    return secrets.token_hex(_BYTES)[: 2 * _BYTES - len(agent_id)] + agent_id


def is_of(agent_id: str, item_id: str) -> bool:
    """Whether this agent assigned the id. Ids of older versions do not have the id of their agent."""
    return is_id(item_id) and item_id.endswith(agent_id)


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of an id."""
    return _ID.fullmatch(text) is not None


class Registry(Generic[T]):
    """Objects by id, in the order in which they were added. ``kind`` names them in errors."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._objects: dict[str, T] = {}
        self._sorted: list[str] = []

    def add(self, item: T) -> None:
        """Add a new object."""
        self._objects[item.id] = item
        bisect.insort(self._sorted, item.id)

    def discard(self, item_id: str) -> None:
        """Remove an object. An unknown id is no error."""
        if self._objects.pop(item_id, None) is not None:
            del self._sorted[bisect.bisect_left(self._sorted, item_id)]

    def exact(self, item_id: str) -> T | None:
        """The object with exactly this id, None if there is none. Any thread may call it."""
        return self._objects.get(item_id)

    def find(self, item_id: str) -> T | None:
        """The object with an id or unique prefix; None if there is none. Raises InvalidArgumentError if ambiguous."""
        exact = self.exact(item_id)
        if exact is not None or not item_id:
            return exact
        first = bisect.bisect_left(self._sorted, item_id)
        matches = [full for full in self._sorted[first : first + 2] if full.startswith(item_id)]
        if len(matches) > 1:
            raise InvalidArgumentError(f"{self._kind} id {item_id!r} is ambiguous: give more characters of it")
        return self._objects[matches[0]] if matches else None

    def get(self, item_id: str) -> T:
        """The object of an id or unique prefix. Raises NotFoundError or InvalidArgumentError."""
        item = self.find(item_id)
        if item is None:
            if not item_id:
                raise InvalidArgumentError(f"no {self._kind} id was given")
            raise NotFoundError(f"{self._kind} {item_id!r} not found")
        return item

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._objects.values()))

    def __len__(self) -> int:
        return len(self._objects)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._objects
