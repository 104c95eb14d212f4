"""The options of checkpoints."""

from __future__ import annotations

import msgspec


class CheckpointOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Checkpoints of containers, which CRIU makes.

    With ``enabled = false`` every checkpoint is refused. ``criu_path`` is CRIU's program (looked up on the PATH if it
    has no slash); the agent works without it. ``failure_log_dir`` is a folder in which CRIU's log of a checkpoint or
    restore that failed is kept; an empty one keeps none. A container may be restored from an archive by its path if
    that is in one of ``archive_dirs``; an empty list allows no path.
    """

    enabled: bool = True
    criu_path: str = "criu"
    failure_log_dir: str = ""
    archive_dirs: tuple[str, ...] = ("/var/lib/kubelet/checkpoints",)
