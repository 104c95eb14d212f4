"""The keys that leave a remote terminal, named as docker names them: ``ctrl-p,ctrl-q``."""

from __future__ import annotations

from host.errors import InvalidArgumentError

DEFAULT = "ctrl-p,ctrl-q"
# ctrl-@ is 0, ctrl-a 1, and so on.
_CONTROLS = "@abcdefghijklmnopqrstuvwxyz[\\]^_"


def parse(text: str) -> bytes:
    """What a terminal sends for the keys; empty for none. Raises InvalidArgumentError."""
    return bytes(map(_code, text.split(","))) if text else b""


def _code(key: str) -> int:
    name, control, character = key.rpartition("ctrl-")
    if control and not name and len(character) == 1 and character.lower() in _CONTROLS:
        return _CONTROLS.index(character.lower())
    if len(key) == 1 and key.isascii() and key.isprintable():
        return ord(key)
    raise InvalidArgumentError(
        f"{key!r} is no key to detach by: give single characters or ctrl- with a letter or one of @ [ \\ ] ^ _, "
        f"separated by commas, as in {DEFAULT}"
    )


class DetachKeys:
    """Finds the keys in the input. The beginning of the key sequence is kept until the next byte decides."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """The bytes to send to the container now, and whether the detach keys were typed; later bytes are dropped."""
        typed = self._held + typed
        if not self._keys:
            return typed, False
        before, found, _ = typed.partition(self._keys)
        if found:
            return before, True
        held = next((n for n in range(len(self._keys) - 1, 0, -1) if typed.endswith(self._keys[:n])), 0)
        self._held = typed[len(typed) - held :]
        return typed[: len(typed) - held], False
