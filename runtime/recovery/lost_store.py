"""A store that is missing, empty or damaged at a start: decides whether the agent starts, and with which data."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import sqlite3
import time
from pathlib import Path

from host.database_copy import open_read_only, problem_of, put_in_place, set_file_aside
from host.errors import LimitError, WrongStateError
from runtime.layout import Layout
from runtime.oci.conmon import Monitors
from runtime.recovery.kept_rows import kept_containers

_NAMED = 5

_log = logging.getLogger("podkeel.store")


class LostStore(enum.Enum):
    """The decision: refuse to start if something would be lost, use the copy, or start with an empty store."""

    REFUSE = "refuse"
    ADOPT = "adopt"
    START_OVER = "start over"


def settle_store(layout: Layout, monitors: Monitors, wish: LostStore) -> bool:
    """Check or restore the database in the data folder before it is opened.

    Blocks. Returns whether a lost store was restored: then the rows in the run folder must be added. Raises
    WrongStateError, with what to do, for a damaged store. Raises it also if containers of this agent run and the store
    is missing, empty or lacks them. ``wish`` can select another decision.
    """
    path, copy = layout.database, layout.database_copy
    problem = problem_of(path)
    running = sorted(monitors.running())
    if not problem and running:
        known = _containers_in(path)
        if known is not None and not known:
            problem = "empty"
        elif known is not None:
            # Its write-ahead log (-wal) was damaged or deleted: SQLite reads the rest as if it were complete.
            kept = (_containers_in(copy) or frozenset()) | kept_containers(layout)
            running = sorted((kept - known).intersection(running))
            problem = "incomplete" if running else ""
    if not problem:
        return False
    if wish is LostStore.START_OVER:
        if problem != "incomplete":
            set_file_aside(path)
    elif wish is LostStore.ADOPT:
        _adopt(layout, problem, running)
        return True
    elif problem not in ("missing", "empty", "incomplete"):
        raise WrongStateError(f"store {path} is {problem}{_how_many(running)}: {_remedy(layout)}")
    elif running:
        ending = "it does not know them and would" if problem == "incomplete" else "a new one would"
        raise WrongStateError(f"store {path} is {problem}{_how_many(running)}: {ending} end them. {_remedy(layout)}")
    elif copy.exists():
        _log.warning(
            "store %s: %s, no container runs: starting with a new store; the old copy is kept as %s (to use it, stop "
            "the agent and rename it)",
            path,
            problem,
            set_file_aside(copy),
        )
    return False


def _adopt(layout: Layout, problem: str, running: list[str]) -> None:
    path, copy = layout.database, layout.database_copy
    if wrong := problem_of(copy):
        kept = kept_containers(layout)
        if not kept:
            raise WrongStateError(
                f"store {path} is {problem}, its copy {copy}, which --adopt would use, is {wrong}, "
                f"and {layout.run} has rows of no container"
            )
        aside = set_file_aside(path)
        _log.warning(
            "store %s: %s, and its copy is %s: making a new store from the rows in %s, for %d of %d running "
            "containers; the others are ended%s",
            path,
            problem,
            wrong,
            layout.run,
            len(kept.intersection(running)),
            len(running),
            f"; the old file is {aside}" if aside else "",
        )
        return
    made_at = _made_at(layout)
    try:
        aside = put_in_place(copy, path)
    except OSError as error:
        raise LimitError(
            f"store {path} is {problem}, and its copy {copy} cannot be put in its place ({error.strerror}): "
            "nothing was changed; free some space and start again with --adopt"
        ) from error
    former = f"; the old file is {aside}" if aside else ""
    _log.warning("store %s: %s: starting with the copy of %s%s", path, problem, made_at, former)


def _containers_in(path: Path) -> frozenset[str] | None:
    """The ids of the containers in a database. None if they cannot be read: then opening it raises the error."""
    try:
        with contextlib.closing(open_read_only(path)) as connection:
            connection.text_factory = os.fsdecode
            return frozenset(str(row[0]) for row in connection.execute("SELECT id FROM containers"))
    except sqlite3.Error:
        return None


def _how_many(running: list[str]) -> str:
    if not running:
        return ""
    names = ", ".join(container_id[:13] for container_id in running[:_NAMED])
    more = ", …" if len(running) > _NAMED else ""
    return f" while {len(running)} containers of this agent run ({names}{more})"


def _remedy(layout: Layout) -> str:
    over = "`podkeel reset --yes` with the same flags ends all its containers and starts over"
    if wrong := problem_of(layout.database_copy):
        lost = f"its copy {layout.database_copy} is {wrong}"
        if not (kept := kept_containers(layout)):
            return f"put it back; {lost}. {over}"
        adopt = f"to continue with the {len(kept)} containers in {layout.run}"
        return f"put it back, or start once with `podkeel serve --adopt` {adopt}; {lost}. {over}"
    adopt = f"put it back, or start once with `podkeel serve --adopt` to continue from the copy of {_made_at(layout)}"
    return f"{adopt} ({layout.database_copy}). {over}"


def _made_at(layout: Layout) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(layout.database_copy.stat().st_mtime))
