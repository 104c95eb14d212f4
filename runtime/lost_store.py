"""A store that is missing, empty or damaged at a start: whether the agent starts all the same, and from what."""

from __future__ import annotations

import contextlib
import enum
import logging
import shutil
import sqlite3
import time

from host.database_copy import problem_of, set_file_aside
from host.errors import WrongStateError
from runtime.layout import Layout
from runtime.monitor import Monitors

_NAMED = 5
_TABLES = ("sandboxes", "containers")

_log = logging.getLogger("podkeel.store")


class LostStore(enum.Enum):
    """What to do about it: refuse to start if that would cost anything, take up the copy, or start over."""

    REFUSE = "refuse"
    ADOPT = "adopt"
    START_OVER = "start over"


def settle_store(layout: Layout, monitors: Monitors, wish: LostStore) -> None:
    """Have a database to open in the data folder, before it is opened. Blocks.

    Raises WrongStateError, which says what there is to do: for a damaged store, and for one that is missing or empty
    while containers of this agent run, unless ``wish`` says otherwise.
    """
    path, copy = layout.database, layout.database_copy
    problem = problem_of(path)
    running = sorted(monitors.running())
    if not problem and running and _knows_nothing(layout):
        problem = "empty"
    if not problem:
        return
    if wish is LostStore.START_OVER:
        set_file_aside(path)
    elif wish is LostStore.ADOPT:
        _adopt(layout, problem)
    elif problem not in ("missing", "empty"):
        raise WrongStateError(f"store {path} is {problem}{_so_many(running)}: {_remedy(layout)}")
    elif running:
        raise WrongStateError(
            f"store {path} is {problem}{_so_many(running)}: a new one would end them. {_remedy(layout)}"
        )
    elif copy.exists():
        _log.warning(
            "store %s: %s, no container runs: a new one is begun; the copy of the former one stays as %s, stop the "
            "agent and put it in its place to go back",
            path,
            problem,
            set_file_aside(copy),
        )


def _adopt(layout: Layout, problem: str) -> None:
    path, copy = layout.database, layout.database_copy
    if wrong := problem_of(copy):
        raise WrongStateError(f"store {path} is {problem}, and its copy {copy}, to be adopted, is {wrong}")
    aside = set_file_aside(path)
    made = path.with_name(f"{path.name}.new")
    shutil.copyfile(copy, made)
    made.replace(path)
    kept = f"; what was there is {aside}" if aside else ""
    _log.warning("store %s: %s: the copy of %s is taken in its place%s", path, problem, _made_at(layout), kept)


def _knows_nothing(layout: Layout) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"{layout.database.as_uri()}?mode=rw", uri=True)) as connection:
            counts = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in _TABLES]
    except sqlite3.Error:
        return False  # tables that are not there, or a file that cannot be opened: who opens it says so
    return not any(counts)


def _so_many(running: list[str]) -> str:
    if not running:
        return ""
    names = ", ".join(container_id[:13] for container_id in running[:_NAMED])
    more = ", …" if len(running) > _NAMED else ""
    return f" while {len(running)} containers of this agent run ({names}{more})"


def _remedy(layout: Layout) -> str:
    over = "`podkeel reset --yes` with the same flags ends all its containers and starts over"
    if problem_of(layout.database_copy):
        return f"put it back; there is no copy of it. {over}"
    adopt = f"put it back, or start once with `podkeel serve --adopt` to go on from the copy of {_made_at(layout)}"
    return f"{adopt} ({layout.database_copy}). {over}"


def _made_at(layout: Layout) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(layout.database_copy.stat().st_mtime))
