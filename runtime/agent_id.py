"""The agent's id. It is kept in the agent's folders. Every id that the agent assigns ends with it.

So the owner of an object is known: several agents may share a cgroup parent, and each sees the slices, links and
processes of all.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from pathlib import Path

from runtime.layout import Layout

_BYTES = 6
_FORM = re.compile(r"[0-9a-f]{12}")

_log = logging.getLogger("podkeel.agent")


def new_agent_id() -> str:
    """A new id: 12 hexadecimal characters."""
    return secrets.token_hex(_BYTES)


def agent_id(layout: Layout) -> str:
    """The id of the agent with these folders. It is made at the agent's first start.

    It is kept in the data folder, and also in the run folder in case the data folder is lost while pods run. If neither
    can be written, the id is valid until the agent ends.
    """
    known = read_agent_id(layout) or new_agent_id()
    for file in _files(layout):
        if _read(file) != known:
            _write(file, known)
    return known


def read_agent_id(layout: Layout) -> str:
    """The id of the agent with these folders; empty before its first start."""
    return next((found for file in _files(layout) if (found := _read(file))), "")


def _files(layout: Layout) -> tuple[Path, Path]:
    return layout.data / "agent-id", layout.run / "agent-id"


def _read(file: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = file.read_text(encoding="ascii").strip()
        return text if _FORM.fullmatch(text) else ""
    return ""


def _write(file: Path, known: str) -> None:
    made = file.with_name(f"{file.name}.new")
    try:
        made.unlink(missing_ok=True)
        made.touch(mode=0o600)
        made.write_text(f"{known}\n", encoding="ascii")
        made.replace(file)
    except OSError as error:
        _log.warning("agent id: %s cannot be written: %s", file, error)
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
