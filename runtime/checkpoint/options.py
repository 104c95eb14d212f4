"""The options of checkpoints."""

from __future__ import annotations

import msgspec


class CheckpointOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Checkpoints of containers, which CRIU makes.

    With ``enabled = false`` every checkpoint is refused. ``criu_path`` is the program CRIU, found on the PATH if it has
    no slash. The agent also works without it. CRIU's log of a failed checkpoint or restore is kept in the folder
    ``failure_log_dir``; if it is empty, no log is kept. A container can be restored from an archive by its path if the
    archive is in one of ``archive_dirs``; if that is empty, no path is allowed.
    """

    enabled: bool = True
    criu_path: str = "criu"
    failure_log_dir: str = ""
    archive_dirs: tuple[str, ...] = ("/var/lib/kubelet/checkpoints",)
