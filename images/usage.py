"""The size of a part of the data folder on disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FilesystemUsage:
    """Kept counts, in bytes and inodes, of the folder ``mountpoint``."""

    mountpoint: str
    used_bytes: int
    inodes_used: int
