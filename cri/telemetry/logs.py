"""The agent's own log, on standard error: text for people, JSON for collectors."""

from __future__ import annotations

import datetime
import logging
import os
import sys

import msgspec

from cri.config.options import LogOptions
from cri.telemetry.repeated_lines import RepeatedLines
from host.errors import printable

_log = logging.getLogger("podkeel.log")


def configure_logging(options: LogOptions) -> None:
    """Send everything from ``options.level`` on to standard error in ``options.format``."""
    handler = logging.StreamHandler()
    formatter = _JsonFormatter() if options.format == "json" else _TextFormatter()
    handler.setFormatter(_JournalFormatter(formatter) if _writes_to_the_journal() else formatter)
    handler.addFilter(RepeatedLines(handler))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(options.level.upper())
    for noisy in ("asyncio", "grpc"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class LogLevel:
    """Changes what is logged while the agent runs; ``configured`` is the level it started with."""

    def __init__(self, configured: str) -> None:
        self.configured = configured

    def show_everything(self) -> None:
        """Log from debug on."""
        self._set("debug")

    def show_configured(self) -> None:
        """Log from the configured level on."""
        self._set(self.configured)

    def _set(self, level: str) -> None:
        logging.getLogger().setLevel(level.upper())
        _log.log(logging.getLogger().level, "log: level: %s from now on", level)


# A message may quote text of an image or a pod: it must not begin a new line, and must not control a terminal.
_CONTROLS = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160)) if chr(number) not in "\n\t"}
_PLAIN = str.maketrans({**_CONTROLS, ord("\n"): "\n    "})


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix("podkeel.")
        line = f"{_timestamp(record)} {record.levelname.lower():7} {name}: {record.getMessage()}"
        seconds = getattr(record, "fields", {}).get("seconds")
        if seconds is not None:
            line += f" ({_duration(seconds)})"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return printable(line.translate(_PLAIN))


# What syslog calls the levels (sd-daemon(3)).
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _JournalFormatter(logging.Formatter):
    """Begins each line with its priority in the form that systemd takes from it, so that ``journalctl -p`` finds it."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in self._inner.format(record).split("\n"))


def _writes_to_the_journal() -> bool:
    """Whether standard error is the stream to the journal that systemd named in the environment (systemd.exec(5))."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # it is closed, or no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = printable(self.formatException(record.exc_info))
        return msgspec.json.encode(entry).decode()
