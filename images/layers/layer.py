"""A layer of this node."""

from __future__ import annotations

from dataclasses import dataclass, replace

_RETIRED = "retired:"


@dataclass(frozen=True, slots=True)
class Layer:
    """An unpacked layer, verified and complete. ``used_bytes`` and ``used_inodes`` are its usage on disk.

    ``blob_digest`` names its compressed blob, and is empty if that was not kept. ``tree_digest`` is the digest of its
    files after unpacking, which is computed if the blob is not kept. A ``retired`` layer was found broken: it stays for
    the containers that use it, and no other image or container gets it.
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
        """Whether only its present users may use it."""
        return self.chain_id.startswith(_RETIRED)

    def retire(self) -> Layer:
        """The same layer with a chain ID that no pull needs."""
        return replace(self, chain_id=f"{_RETIRED}{self.number}")
