"""Checks whether a user may run a command."""

from __future__ import annotations

import os

from host.errors import WrongStateError


def need_root(command: str) -> None:
    """Raises WrongStateError for other users: mounts, namespaces and cgroups belong to root."""
    if os.geteuid() != 0:
        raise WrongStateError(f"podkeel {command} needs root, and this is user {os.geteuid()}: run it with sudo")
