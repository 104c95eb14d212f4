"""Names of signals in the CRI, in images and in the kernel (signal(7))."""

from __future__ import annotations

import logging
import re
import signal
from dataclasses import dataclass

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2

_log = logging.getLogger("podkeel.spec")

_REAL_TIME = re.compile(r"RTM(IN|AX)(?:(?:\+|-|PLUS|MINUS)(\d+))?")


@dataclass(frozen=True, slots=True)
class StopSignal:
    """A signal under its usual name (``SIGTERM``, ``SIGRTMIN+3``) and number."""

    name: str
    number: int


TERMINATE = StopSignal("SIGTERM", signal.SIGTERM)


def stop_signal(config: cri_pb2.ContainerConfig, image_signal: str) -> StopSignal:
    """The configuration's signal, else the image's, else SIGTERM.

    An unknown name in the image is logged and ignored: an image must not make its container unstoppable.
    """
    if config.stop_signal != cri_pb2.Signal.SIGNAL_RUNTIME_DEFAULT:
        known = cri_pb2.Signal.DESCRIPTOR.values_by_number.get(config.stop_signal)
        found = parse_signal(known.name.removeprefix("SIGNAL_")) if known is not None else None
        if found is None:
            raise InvalidArgumentError(f"stop_signal: {config.stop_signal} is not a Signal of this node: use another")
        return found
    if not image_signal:
        return TERMINATE
    found = parse_signal(image_signal)
    if found is None:
        _log.warning("stop signal %r of the image: does not exist: using SIGTERM", image_signal)
    return found or TERMINATE


def parse_signal(text: str) -> StopSignal | None:
    """Parse ``15``, ``TERM``, ``SIGTERM``, ``SIGRTMIN+3`` and ``SIGRTMINPLUS3``. None for any other text."""
    word = text.strip().upper().removeprefix("SIG")
    if word.isdecimal() and word.isascii():
        return _named(int(word)) if len(word) < 3 else None
    real_time = _REAL_TIME.fullmatch(word)
    if real_time is not None:
        distance = int(real_time[2] or 0)
        low = real_time[1] == "IN"
        sign_fits = ("-" in word or "MINUS" in word) != low or not real_time[2]
        number = signal.SIGRTMIN + distance if low else signal.SIGRTMAX - distance
        return _named(number) if sign_fits else None
    known = signal.Signals.__members__.get("SIG" + word)
    return StopSignal("SIG" + word, int(known)) if known is not None else None


def _named(number: int) -> StopSignal | None:
    first, last = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    if first <= number <= last:
        if number - first <= 15:
            return StopSignal("SIGRTMIN" + (f"+{number - first}" if number > first else ""), number)
        return StopSignal("SIGRTMAX" + (f"-{last - number}" if number < last else ""), number)
    try:
        return StopSignal(signal.Signals(number).name, number)
    except ValueError:
        return None
