"""A layer of this node."""

from __future__ import annotations

from dataclasses import dataclass, replace

_RETIRED = "retired:"


@dataclass(frozen=True, slots=True)
class Layer:
    """An unpacked layer, verified and complete; ``used_bytes`` and ``used_inodes`` are what it takes on disk.

    ``blob_digest`` names the compressed form, and is empty if that was not kept; ``tree_digest`` is
    that of its files as they were unpacked, made instead of keeping the blob. A ``retired`` layer was found broken:
    it stays for the containers that have it, and no image gets it any more.
    """

    number: int
    chain_id: str
    diff_id: str
    blob_digest: str
    blob_bytes: int
    used_bytes: int
    used_inodes: int
    opaque: bool
    tree_digest: str = ""

    @property
    def retired(self) -> bool:
        """Whether it only serves those that have it already."""
        return self.chain_id.startswith(_RETIRED)

    def retire(self) -> Layer:
        """The same layer under a chain id that no pull asks for."""
        return replace(self, chain_id=f"{_RETIRED}{self.number}")
