"""The options of CheckpointPod and RestorePod: maps of strings."""

from __future__ import annotations

from collections.abc import Mapping

from host.errors import InvalidArgumentError

SESSIONS, LEAVE_OUT = "sessions", "leave-out"


def leaves_out_sessions(options: Mapping[str, str]) -> bool:
    """Whether attached clients and port forwards are left out of a checkpoint, instead of preventing it.

    Raises InvalidArgumentError for an option or value that CheckpointPod does not have.
    """
    _refuse_unknown("CheckpointPod", options, {SESSIONS})
    value = options.get(SESSIONS)
    if value not in (None, LEAVE_OUT):
        raise InvalidArgumentError(f"CheckpointPod: the option {SESSIONS!r} has the value {value[:100]!r}: {LEAVE_OUT}")
    return value is not None


def check_restore_options(options: Mapping[str, str]) -> None:
    """Raise InvalidArgumentError for any option: RestorePod has none."""
    _refuse_unknown("RestorePod", options, set())


def _refuse_unknown(call: str, options: Mapping[str, str], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise InvalidArgumentError(f"{call} has no option {', '.join(repr(name[:100]) for name in unknown)}: {has}")
